#!/usr/bin/env bash
# What the pipelines do, whichever CI runs them; docs/network.md tells the why.
#
#   network.sh waiting STACK   yes or no: is there an export that the stack has not applied? Asks the portal alone
#   network.sh preview STACK   what would change, refreshed from the cloud; plan.md is the comment on the change
#   network.sh apply STACK     do it, in steps where one apply cannot, and tell the portal; also that it failed
#   network.sh drift STACK     has anybody changed the cloud by hand since the last apply: exit status 1 then
#
# Needs PORTAL_URL, PORTAL_TOKEN (an API token with the scope of the network), and what the backend and the clouds want.
# BELIEVE_STATE=STACK, by hand and once: its state is right, although the portal knows that more was applied.
set -euo pipefail

word=${1:?waiting, preview, apply or drift}
stack=${2:?the stack}
: "${PORTAL_URL:?https://portal.example.org}" "${PORTAL_TOKEN:?an API token of the portal}"
cd "$(dirname "$0")/.."
file="Pulumi.$stack.yaml"
why="It ended early." # what the portal, or the comment, is told if it fails now
export PULUMI_SKIP_UPDATE_CHECK=true PULUMI_SKIP_CONFIRMATIONS=true PYTHONUTF8=1
rm -f export.json applied.json told.json outputs.json preview.json plan.md

# A refusal is a sentence for people: kept for the portal and the comment.
network() {
  local status=0
  python3 -m remotegpu_network "$@" 2>said.txt || status=$?
  cat said.txt >&2
  [ "$status" -ne 1 ] || why=$(head -c 3000 said.txt)
  return "$status"
}

# One signal asks the engine to end what it has begun and to write its state; a second one makes it drop everything, and
# then nobody knows what the cloud has done. CIs signal twice, or all of a process group: so it has a group of its own.
running='' interrupted='' cancelled='' signals=0
engine() {
  local status before
  running=starting
  set -m
  pulumi "$@" </dev/null &
  set +m
  running=$!
  [ -z "$cancelled" ] || interrupt # it came while the engine was being started
  while
    before=$signals status=0
    wait "$running" || status=$?
    [ "$before" != "$signals" ] # a signal ends the wait, not the engine
  do :; done
  running=
  [ -n "$cancelled" ] || return "$status"
  why="The engine was told to end, and has ended." # how, a shell whose wait was interrupted does not know for sure
  exit "$cancelled"
}

cancel() {
  cancelled=$1 signals=$((signals + 1))
  case $running in
    '') exit "$cancelled" ;;
    starting) ;;
    *) interrupt ;;
  esac
}

# In a container GitLab's runner signals every process by itself, the engine before us.
interrupt() {
  [ -n "$interrupted" ] || [ "${CI_DISPOSABLE_ENVIRONMENT:-}" = true ] || kill -INT "$running" || true
  interrupted=yes
}

# The token goes in by standard input: in the arguments every process on this machine could read it.
portal() {
  local path=$1
  shift
  curl --fail --silent --show-error --max-time 60 --retry 3 --config - "$@" "$PORTAL_URL/api/v1/admin/network$path" \
    <<<"header = \"Authorization: Bearer $PORTAL_TOKEN\""
}

# What this stack has applied last, into applied.json; false where the portal does not know it. With a checksum: the
# document that has this one.
applied_last() {
  local answer
  answer=$(portal "/applied?stack=$stack${1:+&checksum=$1}" --no-fail --output applied.json --etag-save applied.etag \
    --write-out '%{http_code}') || exit 1
  case $answer in
    200) return 0 ;;
    404) return 1 ;;
  esac
  echo "The portal does not say what $stack has applied, but $answer." >&2
  exit 1
}

waiting() {
  local answer=200
  if applied_last; then
    answer=$(portal "" --etag-compare applied.etag --output export.json --write-out '%{http_code}')
  fi
  if [ "$answer" = 304 ]; then echo no; else echo yes; fi
}

# Nothing was ever applied.
is_new() {
  pulumi stack output --json --stack "$stack" >outputs.json || exit 1
  [ "$(tr -d ' \n' <outputs.json)" = '{}' ]
}

# In this order each is as new as the one before it, whatever is applied beside this run.
fetch() {
  why="What was applied last could not be learned."
  if applied_last; then
    cp applied.json told.json
    told=told.json applied=applied.json
  fi
  pulumi stack output --json --stack "$stack" >outputs.json
  why="The portal gave no export."
  portal "" --output export.json
  network check export.json --stack "$file"
  network standing outputs.json export.json --told "$told" --name "$stack" --believed "${BELIEVE_STATE:-}" >standing.txt
  where_it_stands
  pulumi config set remotegpu:applied "$applied" --stack "$stack"
}

# A whole export wherever there is one: the guard and the plan name what is gone by it, and steps begin there.
where_it_stands() {
  local word checksum
  read -r word checksum <standing.txt
  case $word in
    first) applied=first ;;
    export) # the portal does not know it yet, or it was not done to its end; no step of its way is done again
      cp export.json applied.json
      applied=applied.json
      ;;
    other) # an apply that the portal was not told of
      if [ -n "$checksum" ] && applied_last "$checksum"; then applied=applied.json; else applied=outputs.json; fi
      ;;
  esac
}

# A run that was cut off leaves operations of which nobody knows whether the cloud did them.
refuse_pending() {
  why="The state could not be read."
  pulumi stack export --stack "$stack" >state.json
  network pending state.json
}

plan() {
  network plan export.json --applied "$(known)" --stack "$file"
}

# To plan against; numbers alone (outputs.json: the portal has lost it) are no export.
known() { if [ "$applied" = applied.json ]; then echo applied.json; else echo first; fi; }

# Shows the program this export, and asks the engine what it would do with it in the cloud as that is now.
preview() {
  pulumi config set remotegpu:export "$1" --stack "$stack"
  why="The engine's preview failed."
  engine preview --stack "$stack" --refresh --non-interactive --json >preview.json
  network gate preview.json "$1" --applied "$(known)" --applied "$told" --stack "$file"
}

# Refreshed like the preview that was let through: without it, what somebody deleted by hand would not be made again.
up() {
  preview "$1"
  why="The engine's apply failed."
  engine up --stack "$stack" --refresh --yes --non-interactive --skip-preview
}

# Only the export is told to the portal. If it fails after a step, what the portal knows is what was there before the
# step, and the outputs are of its generation: the next run makes the same step again, which changes nothing, and goes
# on from there.
apply() {
  local status
  while [ "$applied" = applied.json ]; do
    status=0
    network step export.json --applied applied.json --stack "$file" --out step.json || status=$?
    [ "$status" -ne 0 ] || break
    [ "$status" -eq 3 ] || return "$status"
    up step.json
    mv step.json applied.json
  done
  up export.json
  why="It was applied, but the portal could not be told; the next run does that."
  pulumi stack output --json --stack "$stack" >outputs.json
  portal "/applied?stack=$stack" --request POST --header 'Content-Type: application/json' --data-binary @outputs.json
}

# Against what was applied last: what waits for its apply is no drift. An apply that went on beside it is none either.
drift() {
  local status
  for _ in 1 2 3; do
    applied_last || nothing_to_compare
    refuse_pending
    mv state.json before.json
    pulumi config set remotegpu:applied applied.json --stack "$stack"
    pulumi config set remotegpu:export applied.json --stack "$stack"
    status=0
    engine preview --stack "$stack" --refresh --non-interactive --expect-no-changes || status=$?
    [ "$status" -ne 0 ] || break
    refuse_pending
    ! cmp --silent before.json state.json || break
    echo "Something was applied meanwhile: looking again." >&2
  done
  if [ "$(waiting)" = yes ]; then echo "A newer export waits for its apply: that is no drift."; fi
  return "$status"
}

nothing_to_compare() {
  if is_new; then
    echo "Nothing was ever applied."
    exit 0
  fi
  echo "The portal no longer knows what $stack has applied, so there is nothing to compare with: apply it." >&2
  exit 1
}

run_url() {
  if [ -n "${GITHUB_RUN_ID:-}" ]; then
    echo "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID"
  else
    echo "${CI_JOB_URL:-}"
  fi
}

# Without it the portal would show the apply of before, and leases that wait for nobody knows what.
tell_failure() {
  local status=$? query
  [ "$status" -ne 0 ] || return 0
  trap '' HUP INT TERM # the portal hears of it, however often the job is cancelled
  case $status in 129 | 130 | 137 | 143) why="The run was cut off. $why" ;; esac # by a signal; the engine's own is 255
  query=$(python3 -m remotegpu_network failed export.json --name "$stack" --reason "$why $(run_url)" --out failed.json)
  portal "/applied?$query" --request POST --header 'Content-Type: application/json' --data-binary @failed.json \
    --output /dev/null || echo "The portal could not be told of the failure." >&2
}

comment() {
  local status=$?
  [ "$status" -ne 0 ] || why=
  python3 -m remotegpu_network comment export.json --name "$stack" --applied "$(known)" --stack "$file" \
    --preview preview.json --refused "$why" >plan.md
}

trap 'cancel 129' HUP
trap 'cancel 130' INT
trap 'cancel 143' TERM
applied=first told=first
case $word in
  waiting) waiting ;;
  preview) trap comment EXIT; fetch; plan; preview export.json ;;
  apply) trap tell_failure EXIT; fetch; refuse_pending; plan; apply ;;
  drift) drift ;;
  *) echo "network.sh waiting | preview | apply | drift STACK" >&2; exit 2 ;;
esac
