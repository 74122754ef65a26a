package hostile

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	_ "modernc.org/sqlite" // the index is read as anybody could

	"github.com/meshid/meshid/pkg/ledger"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// killsVariable says how often the CA is killed at random; `make crash` sets it.
const killsVariable = "MESHID_CRASH_KILLS"

// defaultKills take less than a minute on a machine with two cores.
const defaultKills = 12

func kills(t *testing.T) int {
	t.Helper()
	text := os.Getenv(killsVariable)
	if text == "" {
		return defaultKills
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// customers are clients that ask a CA for X.509-SVIDs, whatever happens to it,
// and keep all that they are given.
type customers struct {
	count  atomic.Int64 // certificates received
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex // guards received
	received [][]byte   // leaves, as DER
}

// maxBatch is what a customer asks for at once, at most.
const maxBatch = 4

// newCustomers starts n of them.
func newCustomers(t *testing.T, ca *local.CA, n int) *customers {
	t.Helper()
	c := &customers{}
	ctx, cancel := context.WithCancel(t.Context())
	c.cancel = cancel
	for i := range n {
		var requests [][]byte // a key is of one instance
		for range maxBatch {
			_, request := csr(t)
			requests = append(requests, request)
		}
		r := join(t, ca, fmt.Sprint("customer-", i))
		c.keep(r.chain[0])
		conn := r.dial(t, ca, tlsTo(r.roots, r))
		c.wg.Go(func() { c.ask(ctx, conn, requests, i) })
	}
	t.Cleanup(c.stop)
	return c
}

func (c *customers) stop() {
	c.cancel()
	c.wg.Wait()
}

func (c *customers) keep(leaf []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.received = append(c.received, leaf)
	c.count.Add(1)
}

// ask asks for one to four at once until ctx ends. A call that fails is forgotten:
// what it would have returned was not received by anybody.
func (c *customers) ask(ctx context.Context, conn *grpc.ClientConn, requests [][]byte, n int) {
	client := nodev1.NewNodeServiceClient(conn)
	for round := 0; ctx.Err() == nil; round++ {
		items := make([]*nodev1.IssueItem, 1+(n+round)%maxBatch)
		for i := range items {
			items[i] = &nodev1.IssueItem{
				Entry: "bob", Csr: requests[i], Instance: fmt.Sprintf("unix:%d:%d", n, i), Kind: nodev1.IssueKind_ISSUE_KIND_FIRST,
				Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: int64(bob), Gid: int64(bob), Path: "/bin/x"}},
			}
		}
		bounded, cancel := context.WithTimeout(ctx, patience)
		answer, err := client.Issue(bounded, &nodev1.IssueRequest{Items: items}, grpc.WaitForReady(true))
		cancel()
		if err != nil {
			continue
		}
		for _, r := range answer.GetResults() {
			if svid := r.GetSvid(); svid != nil {
				c.keep(svid.GetChain()[0])
			}
		}
	}
}

// awaitMore waits until the customers have received n certificates more.
func (c *customers) awaitMore(t *testing.T, n int64) {
	t.Helper()
	want := c.count.Load() + n
	local.Await(t, fmt.Sprintf("wait for %d certificates", n), func(context.Context) error {
		if have := c.count.Load(); have < want {
			return fmt.Errorf("%d of %d", have, want)
		}
		return nil
	})
}

// audit ends the CA in good order and compares, from outside, what was received
// with what is in the journal, in its tree and in its index.
func (c *customers) audit(t *testing.T, ca *local.CA) {
	t.Helper()
	c.stop()
	must(t, ca.Stop(t)) // what the customers gave up on is recorded now, or never
	// The tree is compared with the journal, record by record.
	out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(ca.DataDir, "ledger"))
	if !strings.Contains(out, "intact") {
		t.Error(out)
	}

	recorded := recordedSerials(t, ca)
	ca.Start(t)
	ca.AwaitReady(t)
	var indexed map[string]int
	local.Await(t, "wait for the index", func(context.Context) error {
		indexed = indexedSerials(t, filepath.Join(ca.DataDir, "records.db"))
		for serial := range recorded {
			if indexed[serial] == 0 {
				return fmt.Errorf("certificate %x is not in it", serial)
			}
		}
		return nil
	})
	must(t, ca.Stop(t))
	later := recordedSerials(t, ca) // with the CA's own certificate
	missing := 0
	for _, der := range c.received {
		leaf, err := x509.ParseCertificate(der)
		must(t, err)
		sum := sha256.Sum256(der)
		serial := string(leaf.SerialNumber.FillBytes(make([]byte, 16)))
		if !slices.Equal(recorded[serial], sum[:]) {
			missing++
			t.Errorf("certificate %x was received and is not recorded", serial)
		}
	}
	for serial := range recorded {
		if indexed[serial] != 1 {
			t.Errorf("certificate %x is in the index %d times", serial, indexed[serial])
		}
	}
	for serial := range indexed {
		if later[serial] == nil {
			t.Errorf("certificate %x is in the index and not in the journal", serial)
		}
	}
	if len(c.received) == 0 {
		t.Error("nothing was received")
	}
	t.Logf("%d certificates received, %d unrecorded; %d recorded", len(c.received), missing, len(recorded))
}

// recordedSerials reads the journal: the certificates of workloads and nodes, by
// their serials, with their hashes. There is no gap, and no serial is there twice.
func recordedSerials(t *testing.T, ca *local.CA) map[string][]byte {
	t.Helper()
	recorded := map[string][]byte{} // serial → hash of the certificate
	var next uint64
	for e, err := range ledger.Scan(filepath.Join(ca.DataDir, "ledger"), 0) {
		must(t, err)
		if e.Index != next {
			t.Fatalf("record %d is behind record %d", e.Index, next-1)
		}
		next++
		cert := e.Record.GetCertificate()
		switch e.Record.GetEvent() {
		case ledgerv1.Event_EVENT_ISSUE, ledgerv1.Event_EVENT_ATTEST, ledgerv1.Event_EVENT_RENEW_AGENT:
		default:
			continue // of an authority there are several records
		}
		if len(cert.GetSerial()) == 0 {
			continue
		}
		if serial := string(cert.GetSerial()); recorded[serial] != nil {
			t.Errorf("two certificates have serial %x", serial)
		} else {
			recorded[serial] = cert.GetSha256()
		}
	}
	return recorded
}

// indexedSerials counts the certificates of the index by their serials.
func indexedSerials(t *testing.T, path string) map[string]int {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro")
	must(t, err)
	defer db.Close()
	rows, err := db.QueryContext(t.Context(), `SELECT serial FROM certificates`)
	must(t, err)
	defer rows.Close()
	all := map[string]int{}
	for rows.Next() {
		var serial []byte
		must(t, rows.Scan(&serial))
		all[string(serial)]++
	}
	must(t, rows.Err())
	return all
}

// TestFault_F4_KilledWhileClientsAreServed kills the CA at random, while it serves
// and while it starts: whatever any client ever received is recorded.
func TestFault_F4_KilledWhileClientsAreServed(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	c := newCustomers(t, ca, 6)
	for n := range kills(t) {
		if n%4 == 3 { // while it starts
			<-time.After(rand.N(200 * time.Millisecond))
		} else {
			c.awaitMore(t, 1+rand.Int64N(200))
		}
		ca.Kill()
		ca.Start(t)
	}
	ca.AwaitReady(t)
	c.awaitMore(t, 50)
	c.audit(t, ca)
}

// lastSegment is the segment of the journal that is written to.
func lastSegment(t *testing.T, ca *local.CA) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(ca.DataDir, "ledger", "*.segment"))
	must(t, err)
	if len(all) == 0 {
		t.Fatal("the journal has no segment")
	}
	slices.Sort(all)
	return all[len(all)-1]
}

// inject has system calls of the CA on a file changed, as strace's -e inject= says.
// It returns when they are.
func inject(t *testing.T, ca *local.CA, file, what string) {
	t.Helper()
	strace := require.Program(t, "strace")
	call, _, _ := strings.Cut(what, ":")
	log := filepath.Join(t.TempDir(), "strace")
	cmd := exec.CommandContext(t.Context(), strace, "-f", "-o", log, "-P", file, "-e", "trace="+call, "-e", "inject="+what, "-p", strconv.Itoa(ca.PID()))
	attached, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT) // it detaches, if it has not ended with the CA
		_ = cmd.Wait()
	})
	buf := make([]byte, 1024)
	if n, err := attached.Read(buf); err != nil || !strings.Contains(string(buf[:n]), "attached") {
		require.Missing(t, "strace: %s: %v", buf[:n], err)
	}
}

// awaitEnd waits for the end of the CA.
func awaitEnd(t *testing.T, ca *local.CA) {
	t.Helper()
	select {
	case <-ca.Done():
	case <-time.After(patience):
		t.Fatal("the CA goes on")
	}
}

// killedAt starts a CA with customers, has it killed at a step of the journal, and
// starts it again: nobody has received what was not recorded.
func killedAt(t *testing.T, what string, kill func(*testing.T, *local.CA)) {
	t.Helper()
	require.Root(t)
	require.Program(t, "strace")
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	c := newCustomers(t, ca, 4)
	for _, nth := range []int{1, 2, 7} {
		c.awaitMore(t, 10)
		inject(t, ca, lastSegment(t, ca), fmt.Sprintf("%s:when=%d", what, nth))
		if kill != nil {
			kill(t, ca)
		}
		awaitEnd(t, ca)
		ca.Start(t)
		ca.AwaitReady(t)
		c.awaitMore(t, 10)
	}
	c.audit(t, ca)
}

// The CA is killed when it has signed and is about to write the record.
func TestFault_F1_KilledBeforeTheRecord(t *testing.T) {
	t.Parallel()
	killedAt(t, "pwrite64:signal=KILL", nil)
}

// The CA is killed when the record is written and not durable.
func TestFault_F2_KilledBeforeItIsDurable(t *testing.T) {
	t.Parallel()
	killedAt(t, "fdatasync:signal=KILL", nil)
}

// The CA is killed when the record is durable and nobody was told.
func TestFault_F3_KilledBeforeTheReply(t *testing.T) {
	t.Parallel()
	killedAt(t, "fdatasync:signal=STOP", func(t *testing.T, ca *local.CA) {
		t.Helper()
		local.Await(t, "wait until it stands still", func(context.Context) error {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", ca.PID()))
			if err != nil {
				return err
			}
			_, rest, _ := strings.Cut(string(stat), ") ")
			if !strings.HasPrefix(rest, "t") && !strings.HasPrefix(rest, "T") {
				return errors.New("state " + rest[:1])
			}
			return nil
		})
		ca.Kill()
	})
}

// The CA is killed and started again: the agents come back by themselves, and who
// asks gets an identity.
func TestFault_F5_KilledAndStartedAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(w.agent.Address())))
	must(t, err)
	defer source.Close()
	for range 3 {
		w.ca.Kill()
		if id := fetch(t, w.agent); id != "spiffe://example.org/root" { // what the agent has, it has
			t.Errorf("without the CA: %q", id)
		}
		w.ca.Start(t)
		w.ca.AwaitReady(t)
		w.agent.AwaitConnected(t)
		awaitAs(t, bob, w.agent, "spiffe://example.org/bob")
	}
	w.sound(t)
}

// An fsync of the journal fails: the CA never tries it again, says so and ends;
// started again, it is sound, and nobody has what is not recorded.
func TestFault_F14_SyncFails(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"fdatasync:error=EIO", "pwrite64:error=EIO"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			killedAt(t, what, func(t *testing.T, ca *local.CA) {
				t.Helper()
				awaitEnd(t, ca)
				if log := ca.Log(); !strings.Contains(log, "repair the disk and restart") {
					t.Errorf("it says %s", log)
				}
			})
		})
	}
}

// What an interrupted write left is at the end of the journal: it is cut off, once.
func TestFault_F18_TornTailAtTheStart(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	c := newCustomers(t, ca, 2)
	for range 3 {
		c.awaitMore(t, 10)
		ca.Kill()
		path := lastSegment(t, ca)
		content, err := os.ReadFile(path)
		must(t, err)
		end := len(content)
		for end > 0 && content[end-1] == 0 {
			end--
		}
		end = (end + 7) &^ 7 // frames are aligned
		garbage := make([]byte, 300)
		for i := range garbage {
			garbage[i] = byte(rand.UintN(255) + 1)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(garbage, int64(end))
		must(t, errors.Join(err, f.Close()))
		before := len(ca.Log())
		ca.Start(t)
		ca.AwaitReady(t)
		if log := ca.Log()[before:]; !strings.Contains(log, "cut an interrupted write off") {
			t.Errorf("it says %s", log)
		}
	}
	c.awaitMore(t, 10)
	c.audit(t, ca)
}
