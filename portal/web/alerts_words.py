"""What the delivered alerts say, so that it can be translated: the sentences of roles/prometheus/files/.

They are said by Prometheus with values in them, and recognised by their words when they are shown, as the sentences of
the services are (refusals.py). A test holds that these are the sentences of the rules, no more and no fewer.
"""

from __future__ import annotations


def pgettext(_context: str, sentence: str) -> str:
    """Marks a sentence for the catalogue."""
    return sentence


SENTENCES = (
    pgettext(
        "refusal",
        "This fires while Prometheus hears the portal. Where it does not arrive, the portal raises what it knows by itself.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "None is needed."),
    pgettext("refusal", "%(host)s does not answer: neither node_exporter nor its agent was heard for two minutes."),
    pgettext(
        "refusal",
        "Look whether the machine is up (console, power, network); its page says when its agent was last heard.",
    ),
    pgettext("refusal", "Machines whose agent reports and whose node_exporter cannot be asked: %(value)s."),
    pgettext(
        "refusal",
        "Let Prometheus in (docs/operator.md, Monitoring): its list of targets names the machines. Until then all rests on the agents.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "The agent of %(host)s does not report."),
    pgettext("refusal", "Look at the host: `remotegpu-agent doctor`. A lease on it still ends by itself."),
    pgettext("refusal", "The clock of %(host)s is %(value)s s off."),
    pgettext("refusal", "Look at its time service (`timedatectl`). Leases and keys end by the host's clock."),
    pgettext(
        "refusal",
        "%(host)s is frozen: it has seen a newer state than the portal holds, or has not reported since the portal was restored.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "The machine's page has the details; nobody new gets it meanwhile."),
    pgettext("refusal", "The processors of %(host)s have been %(value)s %% busy for a quarter of an hour."),
    pgettext("refusal", "On a leased machine this is the customer's work. On a free one look what runs there."),
    pgettext("refusal", "%(value)s %% of the memory of %(host)s is in use."),
    pgettext(
        "refusal", "Tell the customer before the kernel ends a process. On a free machine look what holds the memory."
    ),
    pgettext("refusal", "%(mountpoint)s of %(host)s is %(value)s %% full."),
    pgettext("refusal", "Plan for room; on a leased machine tell the customer."),
    pgettext("refusal", "Make room today; on a leased machine tell the customer that writing will fail."),
    pgettext("refusal", "Make room now. Writing fails soon, and with it jobs, logs and the agent's journal."),
    pgettext("refusal", "%(host)s has too little free on a disk to be leased."),
    pgettext("refusal", "%(host)s has lost a GPU: fewer answer than it is expected to have."),
    pgettext(
        "refusal",
        "The machine's page names the GPU. Read the kernel log for its XID; a GPU off the bus needs a restart of the machine.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "The NVIDIA driver of %(host)s does not answer, or not rightly."),
    pgettext(
        "refusal",
        "Run `nvidia-smi` on the host. After an update the driver and its library may differ until the machine is restarted.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "A GPU of %(host)s answers with errors."),
    pgettext("refusal", "The GPU exporter of %(host)s does not answer, while the host does."),
    pgettext(
        "refusal",
        "Look at the unit: `systemctl status nvidia-gpu-exporter`. A hung nvidia-smi holds it up, or Prometheus has not been let in.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "GPU %(uuid)s of %(host)s has %(value)s °C."),
    pgettext("refusal", "Look at fans, filters and the room. Above its limit the GPU slows down by itself."),
    pgettext("refusal", "Take load off it now, and look at fans and the room. The hardware may switch itself off."),
    pgettext("refusal", "%(value)s %% of the memory of GPU %(uuid)s of %(host)s is in use."),
    pgettext("refusal", "On a leased machine this is the customer's work. On a free one look which process holds it."),
    pgettext("refusal", "GPU %(uuid)s of %(host)s has %(value)s uncorrected memory errors."),
    pgettext(
        "refusal",
        "Results since then may be wrong. Reset the GPU when it is free; if they come back, have it replaced.",
    ),
    pgettext("refusal", "GPU %(uuid)s of %(host)s waits for a reset to put away a bad row of its memory."),
    pgettext("refusal", "Reset the GPU, or restart the machine, when the lease on it has ended."),
    pgettext("refusal", "GPU %(uuid)s of %(host)s could not put away a bad row of its memory."),
    pgettext("refusal", "Have the GPU replaced."),
    pgettext("refusal", "GPU %(uuid)s of %(host)s has fallen off the bus, XID %(xid)s."),
    pgettext(
        "refusal",
        "Put the machine into maintenance and restart it. If it happens again, have the GPU or its board replaced.",
    ),
    pgettext("refusal", "GPU %(uuid)s of %(host)s needs a reset, XID %(xid)s."),
    pgettext(
        "refusal",
        "Put the machine into maintenance, and reset the GPU or restart the machine before anybody uses it again.",
    ),
    pgettext("refusal", "GPU %(uuid)s of %(host)s reports an error of its memory or NVLink, XID %(xid)s."),
    pgettext(
        "refusal",
        "Put the machine into maintenance and follow NVIDIA's procedure for this XID; run its diagnostics before the next lease.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "A program on GPU %(uuid)s of %(host)s has failed, XID %(xid)s."),
    pgettext(
        "refusal",
        "Mostly a fault of the program, so tell the customer. If different programs meet it on this GPU, test the GPU.",
    ),
    pgettext("refusal", "GPU %(uuid)s of %(host)s reports XID %(xid)s."),
    pgettext("refusal", "Look it up in NVIDIA's catalogue of XIDs, and in the kernel log of the host."),
    pgettext("refusal", "GPU %(uuid)s of %(host)s has put away a bad row of its memory, XID %(xid)s."),
    pgettext("refusal", "%(host)s is not proven clean and is offered to nobody."),
    pgettext("refusal", "Open the report of its reclaim, mend what it names and reclaim it again, or install it anew."),
    pgettext("refusal", "The playbook %(playbook)s has failed on %(host)s."),
    pgettext("refusal", "Read the run's output, mend what it names, and run it again."),
    pgettext("refusal", "Lease %(lease)s of %(host)s ends within %(value)s."),
    pgettext("refusal", "Ask the customer whether it is to be extended; its data is wiped after the retention."),
    pgettext("refusal", "Lease %(lease)s of %(host)s has ended, and a part of it is not seen closed: %(part)s."),
    pgettext(
        "refusal",
        "Look at the agent, or at the pipeline for names and groups. What cannot be reached can be written off.",
    ),
    pgettext("refusal", "Opening %(opening)s of %(host)s is not as it is wanted."),
    pgettext("refusal", "Forward %(forward)s of %(host)s is not as it is wanted."),
    pgettext("refusal", "Look at the host: `remotegpu-agent doctor`."),
    pgettext("refusal", "A change of the network waits to be applied for more than an hour."),
    pgettext(
        "refusal",
        "Look at the pipeline's last run. Names and security groups stay as they were until it has applied it.",
    ),
    pgettext("refusal", "The network is frozen since the portal was restored."),
    pgettext(
        "refusal",
        "Compare what is wanted with what the stacks have applied, then thaw it. No stack gets an export before.",
    ),
    pgettext("refusal", "The portal does not answer Prometheus."),
    pgettext("refusal", "Look at the portal's units and their log. Leases end on their hosts all the same."),
    pgettext("refusal", "%(value)s %% of the portal's answers (%(area)s) are errors of its own."),
    pgettext(
        "refusal",
        "The portal's log has each with an incident number. Look first whether the database and Redis answer.",
    ),
    pgettext("refusal", "For minutes no worker has made a round in which no sweep failed."),
    pgettext(
        "refusal",
        "Read why: `journalctl -u remotegpu-worker`. Until it is mended, leases are ended by their hosts alone, and no machine is cleaned.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "%(value)s %% of the database's connections are taken."),
    pgettext("refusal", "Raise max_connections of PostgreSQL, or run fewer web processes and workers."),
    pgettext("refusal", "The last dump of the database on %(host)s that could be read again is %(value)s old."),
    pgettext(
        "refusal",
        "Read why: `journalctl -u remotegpu-postgresql-backup`. Make one: `systemctl start remotegpu-postgresql-backup`.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "No dump of the database on %(host)s has been told of."),
    pgettext(
        "refusal",
        "Look at `systemctl status remotegpu-postgresql-backup.timer`, and at postgresql_backup_metric_dir, where node_exporter reads it.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "Redis does not answer the portal."),
    pgettext(
        "refusal",
        "Look at the unit: `systemctl status redis-server`. The portal goes on without it, slower; nothing is lost.",
    ),
    pgettext("refusal", "%(value)s %% of Redis's memory is in use."),
    pgettext("refusal", "Raise maxmemory of Redis. It is set to refuse writes when it is full, and does not evict."),
    pgettext("refusal", "The certificate %(certificate)s ends within %(value)s."),
    pgettext(
        "refusal",
        "Its own: `systemctl start remotegpu-certificate`, by hand `portal init`. The authority (ca): docs/operator.md, A new authority. By ACME: `certbot renew`. Another one is for you to bring.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "API token %(token)s ends within %(value)s."),
    pgettext("refusal", "Make a new one, give it to the program that uses it, and revoke this one."),
    pgettext("refusal", "Robot account %(robot)s of Harbor is good until %(value)s."),
    pgettext(
        "refusal",
        "Robot account %(robot)s of Harbor ended %(value)s ago; what pulls with it is refused.",
    ),
    pgettext(
        "refusal",
        "In Harbor, Robot Accounts: give it a longer life, or make a new one and give that to what uses it. Disable or remove one that nothing uses.",  # noqa: E501 - one sentence, as it stands in the rules
    ),
    pgettext("refusal", "For hours nobody could read when the robot accounts of Harbor end."),
    pgettext(
        "refusal",
        "Read why: `journalctl -u remotegpu-harbor-robots`. Try again: `systemctl start remotegpu-harbor-robots`.",
    ),
)
