#!/bin/sh
# Installs what the tests use of the system, when that may be done; else says which tests cannot run, and why.
PATH=$PATH:/usr/sbin:/sbin
missing=""
need() { # program, Debian package, tests that need it
	command -v "$1" >/dev/null 2>&1 || { missing="$missing $2"; echo "$1 is not installed: $3 need it"; }
}
need mosquitto mosquitto "the bus contract on mosquitto, and every test that names it,"
need mosquitto_rr mosquitto-clients "the tests of mosquitto's own clients"
need ip iproute2 "the tests of several hosts in network namespaces"
need tcpdump tcpdump "the test that looks at the wire for data that live on nodes"
need node nodejs "the tests of the JavaScript client"
need npm npm "the tests of the JavaScript client"
need systemd-analyze systemd "the checks of the systemd units"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "installing with apt-get:$missing"
	export DEBIAN_FRONTEND=noninteractive
	# A service that apt starts would take the broker's port: nothing is to be started.
	policy=/usr/sbin/policy-rc.d
	[ -e "$policy" ] || { trap 'rm -f "$policy"' EXIT; trap 'exit 1' INT TERM; printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; }
	apt-get update -qq || echo "apt-get update failed: trying with the lists that are there"
	# One by one: what one of them lacks must not cost the others.
	for package in $missing; do
		apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "$package" >/dev/null ||
			echo "apt-get could not install $package: the tests named above that need it are skipped"
	done
else
	echo "without root on Debian or Ubuntu it is not installed: the tests named above are skipped, each with its reason"
fi
exit 0
