"""Programs of the house: one token each, good for one scope, of an account that nobody signs in to."""

from __future__ import annotations

from datetime import timedelta

import pytest

from portal.errors import Invalid
from portal.models import ApiToken, User
from portal.services import robots, tokens, users
from portal.services.actors import SYSTEM

YEAR = timedelta(days=365)


@pytest.fixture
def secret(database):
    return robots.new_token("prometheus", scope="prometheus", life=YEAR, by=SYSTEM)


def call(client, secret, path):
    return client.get(f"/api/v1{path}", headers={"Authorization": f"Bearer {secret}"})


def test_a_program_comes_in_where_its_scope_leads(client, secret):
    assert call(client, secret, "/prometheus/targets").status_code == 200
    assert call(client, secret, "/admin/machines").status_code == 403


def test_asked_again_the_token_of_before_ends_and_others_stay(client, secret):
    other = robots.new_token("alertmanager", scope="alerts", life=YEAR, by=SYSTEM)
    again = robots.new_token("prometheus", scope="prometheus", life=YEAR, by=SYSTEM)
    assert call(client, secret, "/prometheus/targets").status_code == 401
    assert call(client, again, "/prometheus/targets").status_code == 200
    assert tokens.user_of(other, scope="alerts").username == robots.OWNER
    assert ApiToken.select().where(ApiToken.revoked_at.is_null()).count() == 2


def test_programs_share_one_account_that_nobody_knows_the_password_of(client, secret):
    robots.new_token("alertmanager", scope="alerts", life=YEAR, by=SYSTEM)
    (owner,) = User.select()
    assert (owner.username, owner.role) == (robots.OWNER, "operator")
    body = {"username": robots.OWNER, "password": secret}
    assert client.post("/api/v1/auth/login", json=body).status_code == 401


def test_a_new_token_works_though_somebody_gave_the_account_a_one_time_password(client, secret):
    users.reset_password(users.find(robots.OWNER), by=SYSTEM)
    assert call(client, secret, "/prometheus/targets").status_code == 403
    again = robots.new_token("prometheus", scope="prometheus", life=YEAR, by=SYSTEM)
    assert call(client, again, "/prometheus/targets").status_code == 200


def test_an_unknown_scope_is_refused_and_the_token_of_before_stays(client, secret):
    with pytest.raises(Invalid):
        robots.new_token("prometheus", scope="everything", life=YEAR, by=SYSTEM)
    assert call(client, secret, "/prometheus/targets").status_code == 200
