#!/usr/bin/env bash
# Build the image from the files of the newest commit: containers/build.sh NAME [ARCHIVE]
# ARCHIVE: an OCI archive to write as well, which containers/vipo.def reads.
# BUILDER: docker, podman or buildah (default: the first that works here). BASE: another base than the recipe's, such as a
# local one. BUILD_ARGS: more options for the builder.
# SSL_CERT_FILE: certificate authorities to trust for the downloads, as for any other program.
set -euo pipefail
cd "$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"

name=${1:?give the image a name}
archive=${2:-}
for builder in ${BUILDER:-docker podman buildah}; do
  "$builder" info >/dev/null 2>&1 && break
  builder=
done
[ -n "$builder" ] || { echo "error: no working ${BUILDER:-docker, podman or buildah} here; install or start one" >&2; exit 1; }
[ -z "$(git status --porcelain --untracked-files=no)" ] || echo "warning: uncommitted changes are not in the image" >&2

commit=$(git rev-parse HEAD)
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
# Not the working tree: the image holds what its label says, and nothing that lies about here.
git archive "$commit" | (umask 022 && tar -x --no-same-permissions -C "$context")

options=(--file "$context/containers/Dockerfile" --tag "$name" --build-arg "GIT_COMMIT=$commit" --build-arg SOURCE_DATE_EPOCH=0)
[ -z "${BASE:-}" ] || options+=(--build-arg "BASE=$BASE")
[ -z "${SSL_CERT_FILE:-}" ] || options+=(--secret "id=ca,src=$SSL_CERT_FILE")
# BuildKit takes the time stamps of the image itself from SOURCE_DATE_EPOCH.
[ "$builder" = docker ] || options+=(--timestamp 0 --layers)
"$builder" build "${options[@]}" ${BUILD_ARGS:-} "$context"

case $builder in
  docker)
    docker image inspect --format '{{.Id}}' "$name"
    [ -z "$archive" ] || docker save --output "$archive" "$name"
    ;;
  podman)
    podman image inspect --format '{{.Digest}}' "$name"
    [ -z "$archive" ] || podman save --quiet --format oci-archive --output "$archive" "$name"
    ;;
  buildah)
    buildah inspect --type image --format '{{println .FromImageDigest}}' "$name"
    [ -z "$archive" ] || buildah push --quiet "$name" "oci-archive:$archive"
    ;;
esac
