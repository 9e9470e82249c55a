"""What a service says reaches a page in the reader's language: sentence, values, and reasons within reasons."""

from __future__ import annotations

import io

import pytest
from flask import Flask
from flask_babel import force_locale

from portal.web.frame import told
from portal.web.refusals import sentences_in


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("You have no such key.", "您没有这个密钥。"),
        ("There is a tenant called Quark Labs already.", "已有名为 Quark Labs 的租户。"),
        ("The machine is leased by now, so it cannot become retired.", "机器此时的状态是“已出租”，不能变为“已退役”。"),
        (
            "The provisioning run 7 is failed: The playbook can be repeated.",
            "部署运行 7 的状态为“失败”：可以重复执行该 playbook。",
        ),
        ("The lease has ended. The machine is retired.", "租约已结束。 机器已退役。"),
        (
            "Lease 7 of gpu1 has ended, and a part of it is not seen closed since 2026-11-26 01:30 UTC: security_group",
            "gpu1 的租约 7 已结束，但自 2026-11-26 01:30 UTC 起有一部分尚未确认关闭：安全组规则",
        ),
        (
            "Lease 7 of gpu-1 has ended, and a part of it is not seen closed: keys.",  # as Prometheus says it
            "gpu-1 的租约 7 已结束，但有一部分尚未确认关闭：密钥登录。",
        ),
        (
            "Opening 12 of gpu-1 (tcp 8888-8890 from 203.0.113.0/24) is failed, which is not wanted: "
            "The host does not say why.",
            "gpu-1 的开放端口 12（tcp 8888-8890 from 203.0.113.0/24）处于“失败”状态，与期望不符：主机没有说明原因。",
        ),
        ("'1.2.3' is no IPv4 address", "'1.2.3' 不是 IPv4 地址"),
        ("gpu-7 said something new", "gpu-7 said something new"),
    ],
)
def test_a_refusal_is_read_in_chinese(built_app: Flask, said: str, shown: str) -> None:
    with built_app.app_context(), force_locale("zh_Hans_CN"):
        assert told(said) == shown
    with built_app.app_context(), force_locale("en"):
        assert told(said) == said


def test_a_name_that_looks_like_a_word_for_a_state_stays_a_name(built_app: Flask) -> None:
    with built_app.app_context(), force_locale("zh_Hans_CN"):
        assert told("There is a tenant called ready already.") == "已有名为 ready 的租户。"


def test_sentences_are_read_out_of_the_source_and_nothing_else_is() -> None:
    source = '''
"""A docstring. It is no refusal."""
log.info("This is for the log.")
raise Conflict(f"{machine.name} is {machine.state}, 100% so.", code="wrong_state")
raise RuntimeError("A mistake of the programmer.")
'''
    found = [message for _line, _function, message, _notes in sentences_in(io.BytesIO(source.encode()))]
    assert found == [("refusal", "%(machine_name)s is %(machine_state)s, 100%% so.")]
