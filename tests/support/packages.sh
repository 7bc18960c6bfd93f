#!/bin/sh
# Installs what the tests use of the system, when that may be done, and says so first; else says which tests cannot run, and why.
# `packages.sh systemd` is for tests/systemd.
for_systemd=${1:-}
PATH=$PATH:/usr/sbin:/sbin
missing=""
packages=""
need() { # program, Debian package, tests that need it
	command -v "$1" >/dev/null 2>&1 && return
	missing="$missing
  $1 (package $2): $3 need it"
	packages="$packages $2"
}
look() {
	missing=""
	packages=""
	need mosquitto mosquitto "the bus contract on mosquitto, and every test that names it,"
	need mosquitto_rr mosquitto-clients "the tests of mosquitto's own clients"
	need ip iproute2 "the tests of several hosts in network namespaces"
	need tcpdump tcpdump "the test that looks at the wire for data that live on nodes"
	need node nodejs "the tests of the JavaScript client"
	need npm npm "the tests of the JavaScript client"
	need systemd-analyze systemd "the checks of the systemd units"
	[ "$for_systemd" = systemd ] || return 0
	need systemd-nspawn systemd-container "the tests in a booted machine"
	need nsenter util-linux "the tests in a booted machine"
	need ss iproute2 "the look at open ports"
	need dpkg-deb dpkg "the test of the Debian package"
}
look
[ -z "$packages" ] && exit 0
echo "Some tests use programs that are not on this machine:$missing"
if [ "${SYSTEM_PACKAGES:-}" = no ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "They are not installed (that takes root, on Debian or Ubuntu, and no SYSTEM_PACKAGES=no): those tests are skipped, each with its reason."
	exit 0
fi
echo "You are root, so these system packages are installed now with apt-get (SYSTEM_PACKAGES=no make test skips those tests instead):"
echo " $packages"
export DEBIAN_FRONTEND=noninteractive
# A service that apt starts would take the broker's port: nothing is to be started.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { trap 'rm -f "$policy"' EXIT; trap 'exit 1' INT TERM; printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; }
apt-get update -qq || echo "apt-get update failed: trying with the lists that are there"
# One by one: what one of them lacks must not cost the others.
for package in $packages; do
	apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "$package" >/dev/null ||
		echo "apt-get could not install $package"
done
look
[ -z "$packages" ] || echo "Still not there, so the tests that need them are skipped:$missing"
exit 0
