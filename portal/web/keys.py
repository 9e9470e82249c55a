"""A customer's SSH keys, and where each of them is."""

from __future__ import annotations

from flask import flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, current_user, requires
from portal.errors import Error
from portal.services import keys as ssh_keys
from portal.web.acting import acting
from portal.web.blueprint import bp
from portal.web.forms import Form


@bp.get("/my/keys")
@requires("customer")
def keys() -> ResponseReturnValue:
    return _page(None)


@bp.post("/my/keys")
@requires("customer")
def add_key() -> ResponseReturnValue:
    form = Form.of_request(keep=("name", "key"))
    try:
        key = ssh_keys.add(current_user(), name=form.text("name"), line=form.text("key"), by=actor())
    except Error as error:
        return _page(form.refused(error)), error.status
    flash(gettext("The key %(name)s is added; it is on its way to your machines.", name=key.name), "success")
    return redirect(url_for("web.keys"), 303)


@bp.post("/my/keys/<int:key_id>/remove")
@requires("customer")
def remove_key(key_id: int) -> ResponseReturnValue:
    key = ssh_keys.get_of(current_user(), key_id)
    with acting(gettext("The key %(name)s is removed; it leaves the machines now.", name=key.name)):
        ssh_keys.remove(key, by=actor())
    return redirect(url_for("web.keys"), 303)


def _page(form: Form | None) -> str:
    user = current_user()
    return render_template(
        "keys/list.html", keys=list(ssh_keys.list_of(user)), presence=ssh_keys.presence_of(user), form=form
    )
