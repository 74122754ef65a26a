// Package export sends records of a ledger to real receivers: rsyslog, an
// OpenTelemetry Collector, a webhook in Python, a full disk; and holds what is sent
// to parsers that are not ours. It does not know how the CA decides.
package export

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	"github.com/meshid/meshid/pkg/ledger/export/cef"
	"github.com/meshid/meshid/pkg/ledger/export/ocsf"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	"github.com/meshid/meshid/test/require"
)

var formats = export.Formats{"json": ledger.FormatJSON, "cef": cef.Format, "ocsf": ocsf.Format}

// hostile are texts that an attacker would put into labels and names.
var hostile = []string{
	"plain",
	"a\nCEF:0|meshid|ca|1|issue|forged|1|externalId=666",
	"a\r\n<0>1 2026-01-01T00:00:00Z h meshid-ca - issue [meshid@32473 index=\"666\"] {}",
	`a"] [meshid@32473 index="666"] {"index":666}`,
	`a externalId=666 msg=x|y\|z\=`,
	`\`, `\\`, `"`, `]`, "=", "|", "\x00", "\x1b[2J", "\u202e\u2066txt.exe", "\u2028\u2029\u0085", "\U000e0041", "é 漢 🙂",
	`","index":666,"x":"`,
	strings.Repeat("A", 1<<13),
	strings.Repeat("\n\"", 1<<12),
	" <13>1 - - - - - - 17 <13>1 - - - - - -",
}

// records are one of each event and outcome with a hostile text wherever somebody
// else than the CA may have a say.
func records(longest int) []*ledgerv1.Record {
	var all []*ledgerv1.Record
	n := 0
	for event := range int32(len(ledgerv1.Event_name)) + 5 {
		for outcome := range int32(4) {
			all = append(all, recordWith(ledgerv1.Event(event), ledgerv1.Outcome(outcome), cut(hostile[n%len(hostile)], longest)))
			n++
		}
	}
	return all
}

// cut returns the beginning of s: a journal takes records of 64 KiB.
func cut(s string, longest int) string { return strings.ToValidUTF8(s[:min(len(s), longest)], "") }

func recordWith(event ledgerv1.Event, outcome ledgerv1.Outcome, s string) *ledgerv1.Record {
	now := timestamppb.Now()
	return &ledgerv1.Record{
		Version: 1, Time: now, Event: event, Outcome: outcome, Reason: s, Detail: s, TrustDomain: "example.org", SpiffeId: "spiffe://example.org/" + s,
		Certificate: &ledgerv1.Certificate{Serial: []byte{1, 2}, Sha256: make([]byte, 32), NotBefore: now, NotAfter: now, DnsNames: []string{s}},
		Kind:        ledgerv1.Kind(int32(event) % 4), Instance: s, Call: s, Actor: s, RequestId: s, CaInstance: s, CaVersion: s,
		Workload: &attributesv1.Workload{Docker: &attributesv1.Docker{Name: s, Labels: map[string]string{s: s}}},
		Node:     &ledgerv1.NodeRef{Id: s, Address: "[2001:db8::1]:443", AgentVersion: s},
		Entry:    &ledgerv1.EntryRef{Name: s, Revision: 7}, Authority: &ledgerv1.Authority{Id: s, State: []string{"prepared", "active", s}[event%3]},
		Took: durationpb.New(time.Millisecond), Summary: &ledgerv1.Summary{Count: 3, Since: now},
	}
}

// openJournal opens a journal that is closed with the test.
func openJournal(t *testing.T) *ledger.Journal {
	t.Helper()
	j, err := ledger.Open(filepath.Join(t.TempDir(), "journal"), ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// add appends records as issuing does: it fails if they are not durable in time.
func add(t *testing.T, j *ledger.Journal, all ...*ledgerv1.Record) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, r := range all {
		if _, err := j.Append(ctx, ledger.NewDraft(r, nil)); err != nil {
			t.Fatalf("a record waits for a receiver: %v", err)
		}
	}
}

// few are n harmless records.
func few(n int) []*ledgerv1.Record {
	all := make([]*ledgerv1.Record, n)
	for i := range all {
		all[i] = recordWith(ledgerv1.Event_EVENT_ISSUE, ledgerv1.Outcome_OUTCOME_SUCCESS, "plain")
	}
	return all
}

// fed is an export that goes on.
type fed struct {
	*ledger.Feed
	dir string // of its cursor
}

// feed sends a journal's records to a target until stop is called or the test ends.
func feed(t *testing.T, j *ledger.Journal, dir string, target export.Target) (f *fed, stop func()) {
	t.Helper()
	x, err := export.New(j, target, export.Options{Dir: filepath.Join(dir, "exports"), Name: "test", FromBeginning: true})
	if err != nil {
		t.Fatal(err)
	}
	m, err := ledger.NewFeedMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	f = &fed{dir: dir}
	f.Feed = ledger.NewFeed(j, "test", x, m, ledger.FeedOptions{Timeout: 10 * time.Second, Retry: backoff.Policy{Base: 50 * time.Millisecond, Max: 500 * time.Millisecond}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("feed: %v", err)
		}
	})
	t.Cleanup(stop)
	return f, stop
}

// await waits until a condition holds.
func await(t *testing.T, what string, f *fed, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if f != nil {
				t.Fatalf("waited for %s in vain: %+v", what, f.Lag(time.Now()))
			}
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// taken says that the cursor on the disk is behind all records.
func taken(j *ledger.Journal, f *fed) func() bool {
	return func() bool {
		var cursor struct {
			Next uint64 `json:"next"`
		}
		text, err := os.ReadFile(filepath.Join(f.dir, "exports", "test.cursor"))
		return err == nil && json.Unmarshal(text, &cursor) == nil && cursor.Next == j.Size()
	}
}

// failing says that the last attempt to send failed for a reason.
func failing(f *fed, reason string) func() bool {
	return func() bool {
		err := f.Lag(time.Now()).Err
		return err != nil && strings.Contains(err.Error(), reason)
	}
}

// pki makes a CA, and certificates for a receiver on this machine and for a sender.
func pki(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	caKey, ca := certify(t, "test CA", nil, nil)
	write(t, dir, "ca.pem", "CERTIFICATE", ca.Raw)
	for _, name := range []string{"receiver", "sender"} {
		key, c := certify(t, name, ca, caKey)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(t, dir, name+".pem", "CERTIFICATE", c.Raw)
		write(t, dir, name+".key", "PRIVATE KEY", der)
	}
	return dir
}

func certify(t *testing.T, name string, issuer *x509.Certificate, issuerKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if issuer == nil {
		issuer, issuerKey = c, key
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage, c.IPAddresses = true, true, x509.KeyUsageCertSign, nil, nil
	}
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, &key.PublicKey, issuerKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, c
}

func write(t *testing.T, dir, name, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// senderTLS is the sender's side of pki.
func senderTLS(dir string) export.TLS {
	return export.TLS{CA: dir + "/ca.pem", Certificate: dir + "/sender.pem", Key: dir + "/sender.key"}
}

// start runs a program until the test ends or stop is called with a signal.
func start(t *testing.T, cmd *exec.Cmd) (stop func(syscall.Signal)) {
	t.Helper()
	var log strings.Builder
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func(s syscall.Signal) {
		once.Do(func() {
			cmd.Process.Signal(s)
			cmd.Wait() // its status says how it was ended
			if t.Failed() {
				t.Logf("%s said:\n%s", cmd.Path, log.String())
			}
		})
	}
	t.Cleanup(func() { stop(syscall.SIGKILL) })
	return stop
}

// cached is a program that a script installs into .cache.
func cached(t *testing.T, path, script string) string {
	t.Helper()
	p := filepath.Join(require.Repository(), ".cache", path)
	if _, err := os.Stat(p); err != nil {
		require.Missing(t, "run scripts/%s: %v", script, err)
	}
	return p
}

// lines are those of a file, or none if there is no file yet.
func lines(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	whole := text[:strings.LastIndexByte(string(text), '\n')+1]
	if len(whole) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(whole), "\n"), "\n")
}

// complete checks that each index below n was received, and none above.
func complete(t *testing.T, got []uint64, n uint64, once bool) {
	t.Helper()
	times := make(map[uint64]int)
	for _, i := range got {
		times[i]++
	}
	for i := range n {
		if times[i] == 0 || once && times[i] > 1 {
			t.Errorf("record %d was received %d times", i, times[i])
		}
	}
	if uint64(len(times)) != n {
		t.Errorf("%d different records were received, want %d", len(times), n)
	}
}

// scanner reads long lines.
func scanner(r io.Reader) *bufio.Scanner {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 64<<20)
	return s
}

// freePort is a port that nothing listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}
