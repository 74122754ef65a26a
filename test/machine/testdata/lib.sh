# What both boots share. Each script runs as root on the machine, with what it needs in
# /mnt, and ends by "done".
set -eu
export NO_COLOR=1 SYSTEMD_COLORS=0 PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
tell() {
	code=$?
	[ $code = 0 ] && echo done || {
		echo "ended with $code"
		systemctl --no-pager --full status 'meshid-*' || true
		journalctl --no-pager -o cat -u 'meshid-*' -u kernel-command-line || true
	}
}
trap tell EXIT

# fetch asks for an identity as the user web, and prints its SPIFFE ID.
fetch() {
	setpriv --reuid web --regid web --clear-groups node-agent fetch --timeout 2m -o json >/tmp/svid.json
	echo "web has $(grep -o 'spiffe://[^"]*' /tmp/svid.json | head -1)"
}
