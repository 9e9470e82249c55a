#!/usr/bin/env bash
# What the pipelines do, whichever CI runs them; docs/network.md tells the why.
#
#   network.sh preview STACK   what would change, refreshed from the cloud; plan.md is the comment on the change
#   network.sh apply STACK     do it, in steps where one apply cannot, and tell the portal
#   network.sh drift STACK     has anybody changed the cloud by hand: exit status 1 then
#
# Needs PORTAL_URL, PORTAL_TOKEN (an API token with the scope of the network), and what the backend and the clouds want.
set -euo pipefail

word=${1:?preview, apply or drift}
stack=${2:?the stack}
: "${PORTAL_URL:?https://portal.example.org}" "${PORTAL_TOKEN:?an API token of the portal}"
cd "$(dirname "$0")/.."
file="Pulumi.$stack.yaml"
export PULUMI_SKIP_UPDATE_CHECK=true PULUMI_SKIP_CONFIRMATIONS=true

network() { python3 -m remotegpu_network "$@"; }

# The token goes in by standard input: in the arguments every process on this machine could read it.
portal() {
  local path=$1
  shift
  curl --fail --silent --show-error --max-time 60 --retry 3 --config - "$@" "$PORTAL_URL/api/v1/admin/network$path" \
    <<<"header = \"Authorization: Bearer $PORTAL_TOKEN\""
}

fetch() {
  portal "" --output export.json
  network check export.json --stack "$file"
  pulumi stack output --json --stack "$stack" >outputs.json
  if [ "$(tr -d ' \n' <outputs.json)" = '{}' ]; then
    applied=first # nothing was ever applied
  elif portal "/applied?stack=$stack" --output applied.json; then
    applied=applied.json # the whole export: the guard and the plan name what is gone
  else
    applied=outputs.json # the portal has lost it: the guard still counts
  fi
  pulumi config set remotegpu:export export.json --stack "$stack"
  pulumi config set remotegpu:applied "$applied" --stack "$stack"
}

# A run that was cut off leaves operations of which nobody knows whether the cloud did them.
refuse_pending() {
  pulumi stack export --stack "$stack" >state.json
  network pending state.json
}

preview() {
  local base=$applied
  [ "$base" != outputs.json ] || base=first
  network plan export.json --applied "$base" --stack "$file" --as markdown >plan.md
  pulumi preview --stack "$stack" --refresh --non-interactive --json >preview.json
  network gate preview.json --stack "$file"
}

up() {
  pulumi up --stack "$stack" --yes --non-interactive --skip-preview
  pulumi stack output --json --stack "$stack" >outputs.json
  portal "/applied?stack=$stack" --request POST --header 'Content-Type: application/json' --data-binary @outputs.json
}

apply() {
  local status
  while [ "$applied" = applied.json ]; do
    status=0
    network step export.json --applied applied.json --stack "$file" --out step.json || status=$?
    [ "$status" -ne 0 ] || break
    [ "$status" -eq 3 ] || return "$status"
    pulumi config set remotegpu:export step.json --stack "$stack"
    up
    mv step.json applied.json
    pulumi config set remotegpu:export export.json --stack "$stack"
  done
  up
}

case $word in
  preview) fetch; preview ;;
  apply) refuse_pending; fetch; preview; apply ;;
  drift) fetch; pulumi preview --stack "$stack" --refresh --non-interactive --expect-no-changes ;;
  *) echo "network.sh preview | apply | drift STACK" >&2; exit 2 ;;
esac
