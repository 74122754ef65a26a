package export

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/meshid/meshid/pkg/ledger/export/syslog"
	"github.com/meshid/meshid/test/require"
)

// rsyslogd needs rsyslog with TLS.
func rsyslogd(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/sbin/rsyslogd", "/sbin/rsyslogd"} {
		if _, err := os.Stat(path); err == nil {
			drivers, err := filepath.Glob("/usr/lib*/*/rsyslog/lmnsd_ossl.so")
			if err != nil || len(drivers) == 0 {
				require.Missing(t, "no TLS in rsyslog: install rsyslog-openssl")
			}
			return path
		}
	}
	require.Missing(t, "no rsyslogd: install rsyslog")
	return ""
}

// receiver is an rsyslog that takes syslog over TLS from those who have a
// certificate, and writes what it parsed, with structured data as JSON. It writes a
// message before it reads on (queues are direct).
type receiver struct {
	port, out string
	stop      func(syscall.Signal)
	pid       int
}

func startRsyslog(t *testing.T, dir, keys, port string) *receiver {
	t.Helper()
	r := &receiver{out: filepath.Join(dir, "received")}
	portFile := filepath.Join(dir, "port")
	if err := os.RemoveAll(portFile); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`
global(workDirectory="%[1]s" maxMessageSize="8k"
  defaultNetstreamDriverCAFile="%[2]s/ca.pem" defaultNetstreamDriverCertFile="%[2]s/receiver.pem" defaultNetstreamDriverKeyFile="%[2]s/receiver.key")
main_queue(queue.type="Direct")
module(load="mmpstrucdata")
module(load="imtcp" streamDriver.name="ossl" streamDriver.mode="1" streamDriver.authMode="x509/certvalid")
input(type="imtcp" address="127.0.0.1" port="%[3]s" listenPortFileName="%[1]s/port")
template(name="parsed" type="list") {
  constant(value="{") property(outname="msg" name="msg" format="jsonf") constant(value=",")
  property(outname="app" name="app-name" format="jsonf") constant(value=",")
  property(outname="host" name="hostname" format="jsonf") constant(value=",")
  property(outname="id" name="msgid" format="jsonf") constant(value=",")
  property(outname="facility" name="syslogfacility" format="jsonf")
  constant(value=",\"data\":") property(name="$!rfc5424-sd") constant(value="}\n")
}
action(type="mmpstrucdata")
action(type="omfile" file="%[1]s/received" template="parsed" fileCreateMode="0600")
`, dir, keys, port)
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(rsyslogd(t), "-n", "-f", filepath.Join(dir, "conf"), "-i", filepath.Join(dir, "pid"))
	r.stop = start(t, cmd)
	r.pid = cmd.Process.Pid
	if port != "0" { // then there is no file
		r.port = port
	}
	await(t, "rsyslog to listen", nil, func() bool {
		if port != "0" {
			conn, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}
		text, err := os.ReadFile(portFile)
		r.port = strings.TrimSpace(string(text))
		return err == nil && r.port != ""
	})
	return r
}

// message is what rsyslog found.
type message struct {
	Msg      string                       `json:"msg"`
	App      string                       `json:"app"`
	Host     string                       `json:"host"`
	ID       string                       `json:"id"`
	Facility string                       `json:"facility"`
	Data     map[string]map[string]string `json:"data"`
}

func (r *receiver) messages(t *testing.T) (all []message, indexes []uint64) {
	t.Helper()
	for _, line := range lines(t, r.out) {
		var m message
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %.500s", err, line)
		}
		index, err := strconv.ParseUint(m.Data["meshid@32473"]["index"], 10, 64)
		if err != nil || m.App != "meshid-ca" || m.Facility != "13" || len(m.Data) != 1 {
			t.Fatalf("rsyslog found a message that is none of ours: %.500s", line)
		}
		all, indexes = append(all, m), append(indexes, index)
	}
	return all, indexes
}

func sender(t *testing.T, keys, port, format string) *syslog.Syslog {
	t.Helper()
	s, err := syslog.New(syslog.Config{Address: "127.0.0.1:" + port, Format: format, TLS: senderTLS(keys)}, formats)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What rsyslog parses is each record once, whatever is in it.
func TestRsyslogParses(t *testing.T) {
	keys := pki(t)
	for _, format := range []string{"json", "cef", "ocsf"} {
		t.Run(format, func(t *testing.T) {
			r := startRsyslog(t, t.TempDir(), keys, "0")
			j := openJournal(t)
			add(t, j, records(2000)...)
			f, _ := feed(t, j, t.TempDir(), sender(t, keys, r.port, format))
			await(t, "all records to be taken", f, taken(j, f))
			await(t, "rsyslog to write", nil, func() bool { return len(lines(t, r.out)) >= int(j.Size()) })
			all, indexes := r.messages(t)
			complete(t, indexes, j.Size(), true)
			for i, m := range all {
				text := strings.TrimPrefix(m.Msg, " ")
				if format == "cef" {
					if !strings.HasPrefix(text, "CEF:0|meshid|ca|") {
						t.Fatalf("%.200s", text)
					}
					continue
				}
				var record struct {
					Index    uint64 `json:"index"`
					Unmapped struct {
						Index uint64 `json:"index"`
					} `json:"unmapped"`
				}
				if err := json.Unmarshal([]byte(text), &record); err != nil || record.Index+record.Unmapped.Index != indexes[i] {
					t.Fatalf("%v: index %d, want %d, in %.300s", err, record.Index, indexes[i], text)
				}
			}
		})
	}
}

// TestFault_F64_SyslogReceiver: the receiver stands still, is killed and comes
// back; records are made all the while, and each is received.
func TestFault_F64_SyslogReceiver(t *testing.T) {
	keys, dir, cursors := pki(t), t.TempDir(), t.TempDir()
	r := startRsyslog(t, dir, keys, "0")
	j := openJournal(t)
	f, stop := feed(t, j, cursors, sender(t, keys, r.port, "json"))
	add(t, j, few(300)...)
	await(t, "the first records", f, func() bool { return len(lines(t, r.out)) > 0 })

	if err := syscall.Kill(r.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	add(t, j, few(300)...)
	r.stop(syscall.SIGKILL)
	add(t, j, few(300)...)
	await(t, "the export to fail", f, failing(f, ""))
	stop() // and the CA is stopped as well

	again := startRsyslog(t, dir, keys, r.port)
	f, _ = feed(t, j, cursors, sender(t, keys, again.port, "json"))
	add(t, j, few(100)...)
	await(t, "all records to be taken", f, taken(j, f))
	await(t, "all records to be written", nil, func() bool {
		_, indexes := again.messages(t)
		seen := make(map[uint64]bool)
		for _, i := range indexes {
			seen[i] = true
		}
		return len(seen) == int(j.Size())
	})
	_, indexes := again.messages(t)
	complete(t, indexes, j.Size(), false)
}

// A receiver that is not the one that is meant gets nothing, and neither does
// a sender get in that it does not know.
func TestSyslogCertificates(t *testing.T) {
	keys, others := pki(t), pki(t)
	r := startRsyslog(t, t.TempDir(), keys, "0")
	j := openJournal(t)
	add(t, j, few(3)...)
	f, stop := feed(t, j, t.TempDir(), sender(t, others, r.port, "json"))
	await(t, "the receiver to be refused", f, failing(f, "certificate signed by unknown authority"))
	stop()

	other := senderTLS(keys)
	other.Certificate, other.Key = others+"/sender.pem", others+"/sender.key" // of a CA that the receiver does not know
	stranger, err := syslog.New(syslog.Config{Address: "127.0.0.1:" + r.port, TLS: other}, formats)
	if err != nil {
		t.Fatal(err)
	}
	f, stop = feed(t, j, t.TempDir(), stranger)
	await(t, "the sender to be refused", f, func() bool {
		if taken(j, f)() {
			t.Fatalf("the sender was not refused; %d records were received", len(lines(t, r.out)))
		}
		return failing(f, "")()
	})
	stop()
	if n := len(lines(t, r.out)); n > 0 {
		t.Errorf("%d records were received", n)
	}
	f, _ = feed(t, j, t.TempDir(), sender(t, keys, r.port, "json"))
	await(t, "all records to be taken", f, taken(j, f))
}
