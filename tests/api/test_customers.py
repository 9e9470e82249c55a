"""Customers, staff and tenants: who makes whom, and what a change does at once."""

from __future__ import annotations

import pytest

from portal.models import AuditEntry, Machine, Membership, Tenant, User
from portal.services import tenants
from portal.services.tenants import RIGHTS
from tests.factories import make_lease, make_machine, make_user

TEMPLATE = "{{ lookup('pipe', 'id') }}"


def generation_of(machine):
    return Machine.get_by_id(machine.id).generation


@pytest.fixture
def leased(tenant):
    """A machine that `tenant` has leased."""
    machine = make_machine()
    make_lease(machine, tenant)
    return machine


@pytest.fixture
def elsewhere(other_tenant):
    """A machine of somebody else, whose agent nothing here may wake."""
    machine = make_machine()
    make_lease(machine, other_tenant)
    return machine


def test_a_new_customer_signs_in_once_with_the_password_that_was_shown_once(sign_in, client, operator, tenant):
    body = {"username": "Dora", "tenant_id": tenant.id, "member_role": "viewer", "display_name": "Dora 德"}
    made = sign_in(operator).post("/admin/customers", body)
    assert made.status_code == 201, made.json
    assert made.json["user"]["username"] == "dora"
    credentials = {"username": "dora", "password": made.json["one_time_password"]}
    signed_in = client.post("/api/v1/auth/login", json=credentials).json
    assert signed_in["must_change_password"] is True
    detail = sign_in(operator).get(f"/admin/customers/{made.json['user']['id']}")
    assert made.json["one_time_password"] not in detail.text
    assert detail.json["memberships"] == [{"tenant_id": tenant.id, "tenant": "Acme", "role": "viewer"}]


@pytest.mark.parametrize("username", ["", "a", "Ωmega", "two words", "-x", TEMPLATE, "x" * 65, "../etc", "a\nb"])
def test_a_name_that_could_be_anything_else_is_refused(sign_in, operator, username):
    answer = sign_in(operator).post("/admin/customers", {"username": username})
    assert (answer.status_code, list(answer.json["errors"])) == (422, ["username"])


def test_a_name_is_taken_once(sign_in, operator, customer):
    answer = sign_in(operator).post("/admin/customers", {"username": "CAROL"})
    assert (answer.status_code, answer.json["code"]) == (409, "name_taken")
    assert User.select().where(User.username == "carol").count() == 1


def test_a_customer_that_cannot_join_the_tenant_is_not_made_at_all(sign_in, operator):
    answer = sign_in(operator).post("/admin/customers", {"username": "dora", "tenant_id": 4711})
    assert answer.status_code == 404
    assert not User.select().where(User.username == "dora").exists()


@pytest.mark.parametrize("role", ["admin", "operator", "customer"])
@pytest.mark.parametrize("who", ["admin", "operator", "customer"])
def test_no_door_for_customers_yields_staff(sign_in, request, who, role):
    person = sign_in(request.getfixturevalue(who))
    victim = make_user("customer")
    for method, path in (("POST", "/admin/customers"), ("PATCH", f"/admin/customers/{victim.id}")):
        answer = person.open(method, path, json={"username": "evil", "role": role})
        assert answer.status_code == (403 if who == "customer" else 422)
    assert not User.select().where(User.username == "evil").exists()
    assert User.get_by_id(victim.id).role == "customer"


@pytest.mark.parametrize("who", ["operator", "customer", "viewer"])
def test_only_an_admin_makes_staff(sign_in, request, who):
    answer = sign_in(request.getfixturevalue(who)).post("/admin/staff", {"username": "evil", "role": "admin"})
    assert answer.status_code == 403
    assert not User.select().where(User.username == "evil").exists()


def test_an_admin_makes_an_operator_who_must_change_the_password(sign_in, admin):
    made = sign_in(admin).post("/admin/staff", {"username": "oscar", "role": "operator"})
    assert (made.status_code, made.json["user"]["role"]) == (201, "operator")
    assert User.get(User.username == "oscar").must_change_password
    assert sign_in(admin).post("/admin/staff", {"username": "cuno", "role": "customer"}).status_code == 422


@pytest.mark.parametrize(
    "field", ["id", "role", "password_hash", "generation", "disabled_at", "must_change_password", "created_at"]
)
def test_what_is_the_servers_cannot_be_sent(sign_in, operator, customer, field):
    before = User.get_by_id(customer.id).__data__
    for method, path in (("POST", "/admin/customers"), ("PATCH", f"/admin/customers/{customer.id}")):
        answer = sign_in(operator).open(method, path, json={"username": "dora", field: 1})
        assert (answer.status_code, field in answer.json["errors"]) == (422, True)
    assert User.get_by_id(customer.id).__data__ == before


def test_a_field_is_set_cleared_or_left_alone(sign_in, operator, customer):
    person, path = sign_in(operator), f"/admin/customers/{customer.id}"
    person.patch(path, {"display_name": "Carol", "phone": "+49 30 1", "email": "carol@example.org"})
    edited = person.patch(path, {"display_name": None, "full_name": "Carol C."}).json
    kept = {name: edited[name] for name in ("display_name", "phone", "full_name", "email")}
    assert kept == {"display_name": None, "phone": "+49 30 1", "full_name": "Carol C.", "email": "carol@example.org"}
    assert person.patch(path, {"display_name": ""}).status_code == 422
    assert person.patch(path, {"display_name": "a\u202eb"}).status_code == 422


def test_an_edit_that_changes_nothing_writes_nothing(sign_in, operator, customer):
    sign_in(operator).patch(f"/admin/customers/{customer.id}", {"display_name": None})
    assert not AuditEntry.select().where(AuditEntry.action == "user.edited").exists()


def test_a_disabled_customer_is_out_at_the_next_request_and_every_host_is_told(
    sign_in, operator, customer, leased, elsewhere
):
    person, before = sign_in(customer), (generation_of(leased), generation_of(elsewhere))
    assert sign_in(operator).post(f"/admin/customers/{customer.id}/disable").status_code == 200
    assert person.get("/auth/me").status_code == 401
    assert (generation_of(leased), generation_of(elsewhere)) == (before[0] + 1, before[1])
    assert sign_in(operator).post(f"/admin/customers/{customer.id}/disable").status_code == 409
    assert sign_in(operator).post(f"/admin/customers/{customer.id}/enable").status_code == 200
    assert generation_of(leased) == before[0] + 2
    assert person.get("/auth/me").status_code == 401  # the old sign-in stays ended
    assert sign_in(customer).get("/auth/me").status_code == 200


def test_a_reset_password_works_once_and_ends_every_sign_in(sign_in, client, operator, customer):
    person = sign_in(customer)
    password = sign_in(operator).post(f"/admin/customers/{customer.id}/reset-password").json["one_time_password"]
    assert person.get("/auth/me").status_code == 401
    answer = client.post("/api/v1/auth/login", json={"username": "carol", "password": password})
    assert answer.json["must_change_password"] is True
    assert password not in str([entry.detail for entry in AuditEntry.select()])


@pytest.mark.parametrize("what", ["disable", "enable", "reset-password"])
def test_the_door_for_customers_does_not_reach_staff(sign_in, operator, admin, what):
    answer = sign_in(operator).post(f"/admin/customers/{admin.id}/{what}")
    assert answer.status_code == 404
    assert sign_in(operator).post(f"/admin/staff/{admin.id}/{what}").status_code == 403


def test_nobody_disables_themselves(sign_in, admin):
    assert sign_in(admin).post(f"/admin/staff/{admin.id}/disable").json["code"] == "own_account"
    assert sign_in(admin).get("/auth/me").status_code == 200


def test_the_list_finds_customers_and_only_them(sign_in, operator, customer, viewer, stranger, tenant):
    person = sign_in(operator)

    def names(query):
        return [item["username"] for item in person.get(f"/admin/customers?{query}").json["items"]]

    person.post(f"/admin/customers/{viewer.id}/disable")
    assert names("") == ["carol", "stan", "vera"]
    assert names(f"tenant_id={tenant.id}") == ["carol", "vera"]
    assert names("disabled=true") == ["vera"]
    assert names("disabled=false") == ["carol", "stan"]
    assert names("keyword=STA") == ["stan"]
    assert names("keyword=%25") == []
    assert names("keyword=_a") == []
    assert [item["username"] for item in person.get("/admin/customers?page=2&page_size=2").json["items"]] == ["vera"]


def test_a_tenant_is_made_renamed_and_named_once(sign_in, operator, tenant, other_tenant):
    person = sign_in(operator)
    made = person.post("/admin/tenants", {"name": "  Carbon   GmbH "})
    assert (made.status_code, made.json["name"]) == (201, "Carbon GmbH")
    assert person.post("/admin/tenants", {"name": "Acme"}).status_code == 409
    assert person.patch(f"/admin/tenants/{tenant.id}", {"name": "Bolt"}).status_code == 409
    assert person.patch(f"/admin/tenants/{tenant.id}", {"name": "Acme 2"}).json["name"] == "Acme 2"
    assert person.post("/admin/tenants", {"name": "a\u0000b"}).status_code == 422
    assert person.post("/admin/tenants", {"name": "   "}).status_code == 422
    assert Tenant.select().count() == 3


def test_a_tenant_named_like_a_template_is_only_a_name(sign_in, operator):
    assert sign_in(operator).post("/admin/tenants", {"name": TEMPLATE}).json["name"] == TEMPLATE


def test_members_come_change_and_go_and_the_hosts_are_told_each_time(
    sign_in, operator, stranger, tenant, leased, elsewhere
):
    person, path, before = sign_in(operator), f"/admin/tenants/{tenant.id}/members", generation_of(leased)
    untouched = generation_of(elsewhere)
    assert person.post(path, {"user_id": stranger.id, "role": "viewer"}).status_code == 201
    assert person.post(path, {"user_id": stranger.id, "role": "owner"}).status_code == 409
    assert person.patch(f"{path}/{stranger.id}", {"role": "member"}).json["role"] == "member"
    assert [item["role"] for item in person.get(path).json["items"]] == ["member"]
    assert person.delete(f"{path}/{stranger.id}").status_code == 204
    assert person.delete(f"{path}/{stranger.id}").status_code == 404
    assert person.get(path).json["total"] == 0
    assert (generation_of(leased), generation_of(elsewhere)) == (before + 3, untouched)


def test_a_member_belongs_to_the_tenant_in_the_address(sign_in, operator, customer, other_tenant):
    for method in ("PATCH", "DELETE"):
        path = f"/admin/tenants/{other_tenant.id}/members/{customer.id}"
        assert sign_in(operator).open(method, path, json={"role": "owner"}).status_code == 404
    assert Membership.get(Membership.user == customer).role == "owner"


def test_staff_belongs_to_no_tenant(sign_in, operator, tenant):
    body = {"user_id": operator.id, "role": "owner"}
    assert sign_in(operator).post(f"/admin/tenants/{tenant.id}/members", body).status_code == 404
    with pytest.raises(tenants.Invalid, match="only customers"):
        tenants.add_member(tenant, operator, "owner", by=tenants.Actor("system", "system"))


@pytest.mark.parametrize(("role", "right"), [(role, right) for role in RIGHTS for right in ("look", "use", "manage")])
def test_each_role_has_the_rights_of_the_table_and_no_other(tenant, other_tenant, role, right):
    user = make_user("customer", tenant=tenant, member_role=role)
    has = right in RIGHTS[role]
    assert tenants.may(user, tenant.id, right) is has
    assert tenants.ids_of(user, right) == ([tenant.id] if has else [])
    assert not tenants.may(user, other_tenant.id, right)
    with pytest.raises(tenants.NotFound):
        tenants.require(user, other_tenant.id, right)
    if has:
        tenants.require(user, tenant.id, right)
    else:
        with pytest.raises(tenants.Forbidden, match=role):
            tenants.require(user, tenant.id, right)


def test_the_table_of_rights_is_what_we_say_it_is():
    assert {role: set(rights) for role, rights in RIGHTS.items()} == {
        "owner": {"look", "use", "manage"},
        "member": {"look", "use"},
        "viewer": {"look"},
    }


def test_customers_see_the_tenants_they_belong_to(sign_in, viewer, other_tenant):
    assert [(item["name"], item["role"]) for item in sign_in(viewer).get("/customer/tenants").json["items"]] == [
        ("Acme", "viewer")
    ]


def test_every_change_of_people_is_in_the_audit_trail_with_who_and_where(sign_in, operator, customer):
    sign_in(operator).post(f"/admin/customers/{customer.id}/disable")
    entry = AuditEntry.get(AuditEntry.action == "user.disabled")
    assert (entry.actor_kind, entry.actor_name, entry.actor_role) == ("user", "olga", "operator")
    assert (entry.resource_type, entry.resource_id) == ("user", customer.id)
    assert entry.request == f"POST /api/v1/admin/customers/{customer.id}/disable"
    assert entry.address == "127.0.0.1"
