// What the pages need beyond htmx: copy buttons, dialogs, menus, output that follows its end, and a sign-in that stays
// fresh and loses nothing of what somebody typed.
"use strict";

const cookie = (name) =>
  document.cookie.split("; ").find((pair) => pair.startsWith(`${name}=`))?.slice(name.length + 1) ?? "";

// Something was typed that is not sent yet: nothing may reload the page then.
const isTyping = () => document.querySelector("dialog[open]") !== null
  || [...document.querySelectorAll("main input:not([type=hidden]), main textarea")].some((field) =>
    field.type === "checkbox" ? field.checked !== field.defaultChecked : field.value !== field.defaultValue);

// ── the sign-in ─────────────────────────────────────────────────────────────────────────────────────────────────────

// The access token is renewed when a third of its life is left, by one tab at a time: whoever comes second finds it
// fresh. `renew-at` is when that is, for all tabs.
const life = Number(document.body.dataset.tokenLifeS) * 1000;
const dueAt = () => Number(localStorage.getItem("renew-at"));
const renew = () => navigator.locks.request("renew", async () => {
  if (Date.now() < dueAt()) return true;
  const answer = await fetch("/api/v1/auth/refresh", {
    method: "POST",
    headers: { "X-CSRF-TOKEN": cookie("csrf_refresh_token") },
    keepalive: true, // whoever clicks on a link meanwhile must not lose the only token that is valid from now on
  });
  if (answer.ok) localStorage.setItem("renew-at", String(Date.now() + (life * 2) / 3));
  return answer.ok;
});
const keepFresh = () => setTimeout(async () => {
  const isFresh = await renew().catch(() => { localStorage.setItem("renew-at", String(Date.now() + 5000)); return true; });
  if (isFresh) keepFresh();
}, Math.max(200, dueAt() - Date.now()));
if (document.body.dataset.renewInS) {
  localStorage.setItem("renew-at", String(Date.now() + Number(document.body.dataset.renewInS) * 1000));
  keepFresh();
}

// A request was told that the sign-in is over: renew it, or say so without touching what was typed.
const recover = async () => {
  localStorage.removeItem("renew-at");
  const isFresh = await renew().catch(() => true);
  if (isFresh) return true;
  if (!isTyping()) return window.location.reload();
  const notice = document.querySelector("#sign-in-ended");
  document.querySelector("dialog[open] .card-body")?.prepend(notice); // a dialog covers the rest of the page
  notice.hidden = false;
  return false;
};

// The page that stands in for one whose sign-in had run out (auth/resume.html).
const resume = async ({ resume: address, signIn }) => {
  localStorage.removeItem("renew-at");
  const isFresh = await renew().catch(() => false);
  const typed = document.querySelector("#typed");
  if (typed && isFresh) typed.requestSubmit();
  else if (typed) {
    typed.hidden = false;
    document.querySelector("#renewing").hidden = true;
  } else window.location.replace(isFresh ? address : signIn);
};
if (document.body.dataset.signIn) resume(document.body.dataset);

// ── htmx ────────────────────────────────────────────────────────────────────────────────────────────────────────────

// Every htmx request carries the CSRF token of the cookie it rides on.
document.addEventListener("htmx:configRequest", (event) => {
  event.detail.headers["X-CSRF-TOKEN"] = cookie("csrf_access_token");
});

// An answer that refuses is shown where the page has room for it, not swallowed.
document.addEventListener("htmx:beforeSwap", (event) => {
  if ([403, 404, 409, 413, 422, 429, 503].includes(event.detail.xhr.status)) {
    event.detail.shouldSwap = true;
    event.detail.isError = false;
  }
  if (event.detail.xhr.status === 401) {
    event.detail.isError = false; // it is dealt with
    recover();
  }
});

// ── clicks and keys ─────────────────────────────────────────────────────────────────────────────────────────────────

// Where the browser gives no clipboard away, the text is marked, so that the keyboard can take it.
const copy = async (button) => {
  const source = document.querySelector(button.dataset.copy);
  const label = button.querySelector("span");
  button.dataset.label ??= label.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent.trim());
    label.textContent = button.dataset.done;
  } catch {
    window.getSelection().selectAllChildren(source);
    label.textContent = button.dataset.marked;
  }
  setTimeout(() => { label.textContent = button.dataset.label; }, 1500);
};

document.addEventListener("click", (event) => {
  const on = (name) => event.target.closest(`[${name}]`);
  if (on("data-copy")) copy(on("data-copy"));
  if (on("data-open")) document.querySelector(on("data-open").dataset.open).showModal();
  if (on("data-fill")) {
    const field = document.querySelector(on("data-fill").dataset.fill);
    field.value = on("data-fill").dataset.value;
    field.focus();
  }
  if (on("data-close")) on("data-close").closest("dialog").close();
  if (on("data-toggle")) {
    const isOpen = document.querySelector(on("data-toggle").dataset.toggle).classList.toggle("show");
    on("data-toggle").setAttribute("aria-expanded", String(isOpen));
  }
  for (const menu of document.querySelectorAll("details.account[open]"))
    if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  const menu = event.key === "Escape" && document.querySelector("details.account[open]");
  if (!menu) return;
  menu.open = false;
  menu.querySelector("summary").focus();
});
document.querySelector("dialog[data-opened]")?.showModal(); // its form came back

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-autosubmit]")) event.target.form.submit();
});

// A form is asked about, sent once however often somebody clicks (the second answer would hide what the first one shows
// only once), with a sign-in that lasts and the CSRF token of it.
document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.isSending) return event.preventDefault();
  if (form.dataset.confirm && !form.isSure && !window.confirm(form.dataset.confirm)) return event.preventDefault();
  form.isSure = false;
  form.isSending = form.method === "post";
  setTimeout(() => { form.isSending = false; }, 10000);
  if (form.isSending && document.body.dataset.renewInS && Date.now() >= dueAt()) {
    event.preventDefault();
    await renew().catch(() => false); // if it cannot be: the answer keeps what was typed
    localStorage.setItem("renew-at", String(Date.now() + 5000));
    form.isSending = false;
    form.isSure = true;
    return form.requestSubmit(event.submitter);
  }
  const field = form.querySelector("input[name=csrf_token]");
  if (field) field.value = cookie("csrf_access_token");
}, true);
window.addEventListener("pageshow", () => document.querySelectorAll("form").forEach((form) => { form.isSending = false; }));

// Output follows its end until the reader scrolls up.
const follow = (output) => {
  const atEnd = () => output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  let following = true;
  output.addEventListener("scroll", () => { following = atEnd(); });
  new MutationObserver(() => { if (following) output.scrollTop = output.scrollHeight; })
    .observe(output, { childList: true, characterData: true, subtree: true });
  output.scrollTop = output.scrollHeight;
};
document.querySelectorAll(".output").forEach(follow);
document.addEventListener("htmx:load", (event) => event.target.querySelectorAll?.(".output").forEach(follow));

// Output that comes as server-sent events; EventSource itself resumes with Last-Event-ID. One that was turned away for
// good begins anew, with a fresh sign-in if that was why.
const isSignedIn = async () => (await fetch("/api/v1/auth/me")).status !== 401;
const stream = (output, address, names, textOf) => {
  const source = new EventSource(address);
  source.addEventListener(names.more, (event) => output.append(textOf(JSON.parse(event.data))));
  source.addEventListener(names.end, () => {
    source.close();
    output.dataset.empty = output.dataset.none ?? output.dataset.empty;
    document.body.dispatchEvent(new CustomEvent("stream-ended"));
  });
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return;
    setTimeout(async () => {
      if (!(await isSignedIn().catch(() => true)) && !(await recover())) return;
      output.replaceChildren();
      stream(output, address, names, textOf);
    }, 5000);
  });
};
const colours = /\u001b\[[0-9;]*m/g;
document.querySelectorAll("[data-log]").forEach((output) => {
  stream(output, output.dataset.log, { more: "log", end: "complete" }, (data) => data.text.replace(colours, ""));
});
document.querySelectorAll("[data-run]").forEach((output) => {
  const line = (data) => (data.stdout ? `${data.stdout.replace(colours, "")}\n` : "");
  stream(output, output.dataset.run, { more: "output", end: "end" }, line);
});

// When what may be done here changes, the whole page comes again, unless somebody is typing.
document.querySelectorAll("[data-reload-on-change]").forEach((live) => {
  const version = () => live.querySelector("[data-version]")?.dataset.version;
  const before = version();
  live.addEventListener("htmx:afterSwap", () => {
    if (version() && version() !== before && !isTyping()) window.location.reload();
  });
});

// Times are told in the reader's own zone as well. On a narrow screen a row of a table is a card: each cell says which
// column it is.
const dress = (root) => {
  root.querySelectorAll("time[datetime]").forEach((time) => {
    time.title = new Date(time.dateTime).toLocaleString(undefined, { timeZoneName: "short" });
  });
  root.querySelectorAll("table.stacked").forEach((table) => {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    table.querySelectorAll("tbody td").forEach((cell) => {
      if (heads[cell.cellIndex] && cell.colSpan === 1) cell.dataset.label = heads[cell.cellIndex];
    });
  });
};
dress(document);
document.addEventListener("htmx:load", (event) => dress(event.target));
