#!/usr/bin/env bash
# `make test-fresh`: the newest commit on a fresh Debian or Ubuntu, made here with debootstrap, that holds nothing but the
# packages which the README's apt-get line names: make env, vipo --help, a tiny experiment, as an ordinary user.
# Needs root, debootstrap, 12 GB of disk and the network. SUITE: bookworm (default), trixie, noble, … MIRROR: its mirror.
# SCRIPT: debootstrap's script where it knows the suite not yet (gutsy for any Ubuntu, which needs ubuntu-keyring as well).
# SSL_CERT_FILE and the proxy variables are handed on.
set -euo pipefail
cd "$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
suite=${SUITE:-bookworm}
read -ra packages < <(sed -n 's/^sudo apt-get .*install //p' README.md)
[ "${#packages[@]}" -gt 0 ] || { echo "error: README.md names no apt-get line" >&2; exit 1; }

work=$(mktemp -d)
root=$work/root
clean() {
  for mounted in dev/shm proc; do ! mountpoint -q "$root/$mounted" || umount "$root/$mounted"; done
  rm -rf --one-file-system "$work"
}
trap clean EXIT
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "fresh $suite"
debootstrap --variant=minbase "$suite" "$root" ${MIRROR:-} ${SCRIPT:-} >"$work/debootstrap.log" || { tail "$work/debootstrap.log"; exit 1; }
cp /etc/resolv.conf "$root/etc/resolv.conf"
case $suite in
  # Python's older and newer versions are in this part of Ubuntu's archive, which every installed Ubuntu reads.
  jammy | noble | plucky | questing) sed -i 's/ main$/ main universe/' "$root/etc/apt/sources.list" ;;
esac
mkdir -p "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=1g tmpfs "$root/dev/shm"
chroot "$root" useradd --create-home --shell /bin/bash newcomer

handed=(PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/newcomer USER=newcomer LANG=C.UTF-8)
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  [ -z "${!name:-}" ] || handed+=("$name=${!name}")
done
if [ -n "${SSL_CERT_FILE:-}" ]; then
  cp "$SSL_CERT_FILE" "$root/authorities.pem"
  handed+=(SSL_CERT_FILE=/authorities.pem PIP_CERT=/authorities.pem)
fi
chroot=$(command -v chroot)
newcomer() { env -i "${handed[@]}" "$chroot" --userspec=newcomer "$root" bash -c "cd ~/vipo && $1"; }
install() {
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
    "$chroot" "$root" apt-get install --quiet --yes --no-install-recommends "$@" >>"$work/apt.log" || { tail "$work/apt.log"; exit 1; }
}
chroot "$root" apt-get update --quiet >"$work/apt.log"
git clone --quiet . "$root/home/newcomer/vipo"
chroot "$root" chown --recursive newcomer:newcomer /home/newcomer/vipo

step "make env says what is missing"
install make
if newcomer 'make env' 2>"$work/said"; then echo "error: nothing was missing" >&2; exit 1; fi
cat "$work/said"
# All of it at once, and as a line that works.
grep -q 'git: ' "$work/said"
read -ra offered < <(sed -n 's/^on Debian or Ubuntu: .*install --yes //p' "$work/said")
install "${offered[@]}"
newcomer 'workflow/preflight.sh'
install "${packages[@]}"

step "make env"
newcomer 'make env'
newcomer 'du --summarize --human-readable --total .venv .uv ~/.cache'

step "vipo --help"
newcomer '.venv/bin/vipo --help' >"$work/help"
grep -q 'Visual Preference Policy Optimization' "$work/help"

step "a tiny experiment"
overrides=(
  training.updates=2 training.prompts_per_update=2 training.group_size=4 training.micro_batch=4 training.trained_transitions=2
  'training.save_at=[]' sampling.steps=4 evaluation.prompts=4 evaluation.steps=4 evaluation.bootstrap=200
  evaluation.shown_prompts=2 '~experiment.arms.product' '~experiment.arms.inverted' 'experiment.arms.grpo.seeds=[0]'
  'experiment.arms.vipo.seeds=[0]'
)
written="[$(printf '%s,' "${overrides[@]}")]"
newcomer "PATH=\$PWD/.venv/bin:\$PATH snakemake --profile local --config experiment=demo 'overrides=${written/,]/]}'"
[ -s "$root/home/newcomer/vipo/results/demo/report/index.html" ]

step "passed on $suite"
