#!/bin/sh
# Builds a real kube-apiserver (Kubernetes 1.20.2) from Debian's source package, once, and prints where it is.
# Five to ten minutes on two cores; root, for the Debian packages that it needs. `find` only says where it is.
#
#   kube-apiserver.sh build|find
#
# KUBE_CACHE: where it is kept, instead of ~/.cache/flanneld-tests.
set -eu
cache=${KUBE_CACHE:-${HOME:-/root}/.cache/flanneld-tests}
# the number goes up when something below changes
binary=$cache/kube-apiserver-1.20.2-1
case ${1:-} in
find)
    test -x "$binary" && echo "$binary"
    exit
    ;;
build) ;;
*)
    sed -n '2,8p' "$0" >&2
    exit 2
    ;;
esac
if test -x "$binary"; then
    echo "$binary"
    exit
fi

work=$cache/build.$$
mkdir -p "$work/lists/partial"
echo "building $binary: this takes some minutes, once" >&2
exec 3>&1 4>&2 >"$work/log" 2>&1
trap 'status=$?; test $status = 0 || tail -n 20 "$work/log" >&4; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# a list of sources of its own: the machine's may name no source packages
{ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
    sed -n 's/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\) .*/\2/p' >"$work/uris"
sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | tr ' ' '\n' >>"$work/uris" || true
uri=$(grep -v security "$work/uris" | head -n 1)
test -n "$uri" || { echo "there is no Debian archive in /etc/apt"; exit 1; }
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$key] $uri bookworm main" >"$work/sources.list"
apt="-o Dir::Etc::sourcelist=$work/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$work/lists -o APT::Sandbox::User=root"
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
    ca-certificates dpkg-dev gcc golang-1.19-go golang-github-modern-go-reflect2-dev libc6-dev make rsync
cd "$work"
# shellcheck disable=SC2086
apt-get $apt update -q
# shellcheck disable=SC2086
apt-get $apt source -q --download-only kubernetes
tar xzf kubernetes_*.orig.tar.gz
cd kubernetes-1.20.2
# the one in the tarball knows maps as they were before Go 1.18, and crashes
rm -rf vendor/github.com/modern-go/reflect2
cp -rL /usr/share/gocode/src/github.com/modern-go/reflect2 vendor/github.com/modern-go/
PATH=/usr/lib/go-1.19/bin:$PATH GOPROXY=off GOFLAGS=-mod=vendor GOLDFLAGS="-s -w" FORCE_HOST_GO=y GOCACHE=$work/go \
    KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_COMMIT=0 KUBE_GIT_TREE_STATE=clean KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 \
    make WHAT=cmd/kube-apiserver
# whole or not at all
mv _output/bin/kube-apiserver "$binary"
echo "$binary" >&3
