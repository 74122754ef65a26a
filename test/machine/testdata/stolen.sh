# A boot of the same disk in another machine: the key of the cache is bound to the TPM of
# the one that was.
. /mnt/lib.sh

echo "== in another machine"
systemd-creds --name=sealing_key decrypt /etc/credstore.encrypted/meshid.sealing_key - >/dev/null 2>/tmp/why && echo "key is read" || echo "key is not read"
systemctl start meshid-node-agent && echo "agent runs" || echo "agent does not run"
systemctl show -p Result -p ExecMainStatus meshid-node-agent
