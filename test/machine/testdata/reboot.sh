# The second boot: nobody does anything, and all is as it was. Then all is removed.
. /mnt/lib.sh

echo "== after a reboot"
systemctl start multi-user.target # what a boot without this script comes to
fetch
systemctl is-active meshid-ca meshid-node-agent
ca node list -o json | tr -d ' \n' | grep -o '"id":"[^"]*"'
echo "attestations $(ca ledger find --event attest -o jsonl | wc -l)"

echo "== remove"
. /mnt/example-remove
find / -xdev \( -path /tmp -o -path /proc -o -path /sys \) -prune -o -iname '*meshid*' -print
systemctl list-unit-files --no-legend 'meshid*' || true # it fails if there is none
echo "== removed"
