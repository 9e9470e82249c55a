// What the pages need beyond htmx: copy buttons, dialogs, output that follows its end, and a sign-in that stays fresh.
"use strict";

const cookie = (name) =>
  document.cookie.split("; ").find((pair) => pair.startsWith(`${name}=`))?.slice(name.length + 1) ?? "";

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
  if (event.detail.xhr.status === 401) window.location.reload();
});

document.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) {
    const source = document.querySelector(copy.dataset.copy);
    await navigator.clipboard.writeText(source.textContent.trim());
    const label = copy.querySelector("span");
    const before = label.textContent;
    label.textContent = copy.dataset.done;
    setTimeout(() => { label.textContent = before; }, 1500);
  }
  const opener = event.target.closest("[data-open]");
  if (opener) document.querySelector(opener.dataset.open).showModal();
  const closer = event.target.closest("[data-close]");
  if (closer) closer.closest("dialog").close();
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-autosubmit]")) event.target.form.submit();
});

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
  const field = event.target.querySelector("input[name=csrf_token]");
  if (field) field.value = cookie("csrf_access_token");
}, true);

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

// Output that comes as server-sent events; EventSource itself resumes with Last-Event-ID.
const stream = (output, address, names, textOf) => {
  const source = new EventSource(address);
  source.addEventListener(names.more, (event) => output.append(textOf(JSON.parse(event.data))));
  source.addEventListener(names.end, () => {
    source.close();
    document.body.dispatchEvent(new CustomEvent("stream-ended"));
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

// When a machine's state or run changes, what may be done to it changes as well: the whole page comes again.
document.querySelectorAll("[data-reload-on-change]").forEach((live) => {
  const version = () => live.querySelector("[data-version]")?.dataset.version;
  const before = version();
  live.addEventListener("htmx:afterSwap", () => {
    const isBusy = document.querySelector("dialog[open]");
    if (version() && version() !== before && !isBusy) window.location.reload();
  });
});

// The access token is renewed when a third of its life is left, by one tab at a time: whoever comes second finds it
// fresh. `renew-at` is when that is, for all tabs.
const life = Number(document.body.dataset.tokenLifeS) * 1000;
const dueAt = () => Number(localStorage.getItem("renew-at"));
const renew = () => navigator.locks.request("renew", async () => {
  if (Date.now() < dueAt()) return true;
  const answer = await fetch("/api/v1/auth/refresh", {
    method: "POST",
    headers: { "X-CSRF-TOKEN": cookie("csrf_refresh_token") },
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
if (document.body.dataset.resume) {
  localStorage.removeItem("renew-at");
  renew().then((ok) => { window.location.replace(ok ? document.body.dataset.resume : document.body.dataset.signIn); });
}

document.querySelectorAll("time[datetime]").forEach((time) => {
  time.title = new Date(time.dateTime).toLocaleString(undefined, { timeZoneName: "short" });
});
