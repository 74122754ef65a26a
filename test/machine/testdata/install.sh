# The first boot: CA and node agent are installed as docs/machines.md says, and the machine
# joins with a token.
. /mnt/lib.sh
mkdir -p /etc/sysusers.d
echo 'u web 2001 "a workload"' >/etc/sysusers.d/web.conf
echo '127.0.0.1 ca.example.org' >>/etc/hosts
work=$(mktemp -d)
cp /mnt/ca /mnt/node-agent /mnt/meshid* "$work" && cd "$work"

echo "== the CA"
. /mnt/example-ca
ca status
. /mnt/example-token
. /mnt/example-entry

echo "== the node agent"
. /mnt/example-agent
fetch
systemctl is-active meshid-ca meshid-node-agent
node-agent status

echo "== what they may"
systemd-analyze security --no-pager meshid-ca meshid-node-agent | tail -3
echo "== warnings"
journalctl --no-pager -o cat -u meshid-ca -u meshid-node-agent | grep -E 'level=(WARN|ERROR)' || true

echo "== killed"
was=$(systemctl show -p MainPID --value meshid-node-agent)
systemctl kill --signal=KILL meshid-node-agent
until now=$(systemctl show -p MainPID --value meshid-node-agent) && [ "$now" != 0 ] && [ "$now" != "$was" ]; do sleep 0.2; done
systemctl start meshid-node-agent # until it is ready
echo "restarts $(systemctl show -p NRestarts --value meshid-node-agent)"
fetch

echo "== restarted"
systemctl restart meshid-ca
ca status --wait 2m
fetch

echo "== root in a container"
unshare --pid --fork --mount-proc ca status && echo "ca answers" || echo "ca refuses"
unshare --pid --fork --mount-proc node-agent status && echo "agent answers" || echo "agent refuses"
