#!/bin/sh
# Stands in for Harbor's installer: loads the image, writes what `prepare` writes, starts it.
set -eu
cd "$(dirname "$0")"
docker load --quiet --input ./harbor.v2.12.2.tar
./prepare "$@"
docker-compose up --detach
