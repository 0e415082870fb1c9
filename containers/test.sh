#!/usr/bin/env bash
# `make test-image`: build from a Debian base made here (no image registry), build again and compare the images, run a small
# experiment in the image and compare the results with this machine's, run the unprivileged tests in the image.
# Needs root, buildah and debootstrap and 40 GB of disk.
set -euo pipefail
cd "$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
export BUILDER=buildah BASE=localhost/vipo-base BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
unset OMP_NUM_THREADS

work=$(mktemp -d)
container=
clean() {
  [ -z "$container" ] || buildah rm "$container" >/dev/null
  rm -rf "$work"
}
trap clean EXIT
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "base: Debian bookworm"
if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
  debootstrap --variant=minbase bookworm "$work/rootfs" >"$work/debootstrap.log"
  rm -rf "$work"/rootfs/var/{cache,log}/* "$work"/rootfs/var/lib/apt/lists/*
  : >"$work/rootfs/etc/machine-id"
  base=$(buildah from scratch)
  buildah add --quiet "$base" "$work/rootfs" / >/dev/null
  buildah commit --quiet --rm --timestamp 0 "$base" "$BASE" >/dev/null
  rm -rf "$work/rootfs"
fi

step "image"
containers/build.sh vipo | tee "$work/build.log"
digest=$(tail -n 1 "$work/build.log")
buildah images --format '{{.Name}} {{.Size}}' --filter reference=localhost/vipo

step "the same image again"
BUILD_ARGS=--no-cache containers/build.sh vipo-again | tee "$work/again.log"
layers() { buildah inspect --type image --format '{{range .OCIv1.RootFS.DiffIDs}}{{println .}}{{end}}' "$1"; }
diff <(layers vipo) <(layers vipo-again)
[ "$(tail -n 1 "$work/again.log")" = "$digest" ]
buildah rmi vipo-again >/dev/null

step "experiment in the image and here"
overrides=(
  training.updates=4 training.group_size=4 training.micro_batch=4 training.trained_transitions=2 'training.save_at=[]'
  training.checkpoint_every=1 sampling.steps=4 evaluation.prompts=4 evaluation.steps=4 evaluation.bootstrap=200
  evaluation.shown_prompts=2 '~experiment.arms.product' '~experiment.arms.inverted' 'experiment.arms.grpo.seeds=[0]'
  'experiment.arms.vipo.seeds=[0]'
)
whole=(snakemake --profile local --quiet --config experiment=demo "overrides=[$(printf '"%s",' "${overrides[@]}")]")
mkdir -m 1777 "$work/results"
container=$(buildah from --pull-never vipo)
inside() { buildah run --volume "$work/results:/vipo/results" --env "VIPO_IMAGE_DIGEST=$digest" "$container" -- "$@"; }
inside sh -c '[ "$(id -u)" = 1000 ] && ! touch vipo/cli.py 2>/dev/null'
# Pre-empted after its first update, as a spot machine does it; the workflow then takes the run up.
inside sh -c 'tini -- vipo train experiment=demo arm=vipo "$@" &
  until [ -d results/demo/runs/vipo-s0/checkpoints/000001 ]; do kill -0 $! || exit 1; sleep 0.1; done
  kill -TERM $!; wait $!; [ $? = 75 ]' sh "${overrides[@]}"
inside "${whole[@]}"
mkdir "$work/here"
git archive HEAD | tar -x -C "$work/here"
(cd "$work/here" && PYTHONPATH=$work/here OMP_NUM_THREADS=1 "${whole[@]}")
# Everything but what tells of time, machine and place.
deterministic() {
  (cd "$1/demo" && find prompts embeddings runs samples evaluation -type f \
    ! -path '*/tb/*' ! -path '*/sheets/*' ! -path '*/trackers/*' ! -path '*/checkpoints/*' ! -path '*/.*' ! -name provenance.json ! -name timing.jsonl \
    -exec sha256sum {} +) | sort -k 2
}
diff <(deterministic "$work/results") <(deterministic "$work/here/results")
same=$(deterministic "$work/results" | wc -l)
# Two empty lists do not differ either.
[ "$same" -gt 0 ]
echo "$same files are the same bytes"
python3 - "$work/results/demo/runs/vipo-s0/provenance.json" "$digest" "$(git rev-parse HEAD)" <<'PYTHON'
import json, sys
path, digest, commit = sys.argv[1:]
record = json.load(open(path))
assert (record["container_digest"], record["git"]["commit"]) == (digest, commit), record
PYTHON

step "unprivileged tests in the image"
inside pytest -n "$(nproc)" --dist loadscope -m 'not browser and not root and not slurm'

step "passed: $digest"
