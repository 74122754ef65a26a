package hostile

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// edit changes the database of a CA that does not run, as somebody with access to
// it could.
func edit(t *testing.T, ca *local.CA, query string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(ca.DataDir, "meshid.db"))
	must(t, err)
	result, err := db.ExecContext(t.Context(), query, args...)
	must(t, err)
	n, err := result.RowsAffected()
	must(t, errors.Join(err, db.Close()))
	if n == 0 {
		t.Fatalf("%s changes nothing", query)
	}
}

// refusedStart starts a CA that must not start, and returns what it says.
func refusedStart(t *testing.T, ca *local.CA) string {
	t.Helper()
	before := len(ca.Log())
	ca.Start(t)
	awaitEnd(t, ca)
	log := ca.Log()[before:]
	if _, why, found := strings.Cut(log, "error: "); found {
		return why
	}
	t.Fatalf("it says %s", log)
	return ""
}

// unrecorded is the message of the condition about the store, "" if there is none.
func unrecorded(t *testing.T, ca *local.CA) string {
	t.Helper()
	s, err := ca.Admin.GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	must(t, err)
	for _, c := range s.GetConditions() {
		if c.GetName() == "store_unrecorded" && c.GetSeverity() != health.OK.String() {
			return c.GetMessage()
		}
	}
	return ""
}

// Rows of the database are edited by hand, added and removed: what the ledger does
// not say is not in force, which is an alarm until it is put right, also after
// another start.
func TestFault_F17_RowsEditedByHand(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	node := join(t, ca, "node")
	conn := node.dial(t, ca, tlsTo(node.roots, node))
	issued := func(entry string, uid uint32) bool {
		t.Helper()
		var svid bool
		local.Await(t, "ask for "+entry, func(context.Context) error {
			r, err := issue(t, conn, entry, uid)
			svid = r.GetSvid() != nil
			return err
		})
		return svid
	}
	must(t, ca.Stop(t))
	edit(t, ca, `UPDATE entries SET entry = replace(entry, '23001', '23003') WHERE name = 'alice'`) // alice's identity for mallory
	edit(t, ca, `INSERT INTO entries (name, entry, revision) SELECT 'extra', replace(replace(entry, '23002', '23003'), '"bob"', '"extra"'), revision FROM entries WHERE name = 'bob'`)
	edit(t, ca, `DELETE FROM entries WHERE name = 'root'`)
	for range 2 { // the record of what is not in force does not make it recorded
		ca.Start(t)
		ca.AwaitReady(t)
		if issued("alice", mallory) || issued("extra", mallory) || issued("alice", alice) {
			t.Error("an X.509-SVID was issued by an entry that nobody applied")
		}
		if !issued("bob", bob) {
			t.Error("an entry that nobody touched is not in force")
		}
		if message := unrecorded(t, ca); !strings.Contains(message, "alice, extra, root") {
			t.Errorf("the condition is %q", message)
		}
		must(t, ca.Stop(t))
	}
	ca.Start(t)
	ca.AwaitReady(t)
	ca.Apply(t, entries)
	ca.MustCommand(t, "entry", "delete", "extra")
	if message := unrecorded(t, ca); message != "" {
		t.Errorf("the condition is %q", message)
	}
	if !issued("alice", alice) {
		t.Error("alice's entry is not in force though it was applied again")
	}
	must(t, ca.Stop(t))
	ca.Start(t)
	ca.AwaitReady(t)
	if message := unrecorded(t, ca); message != "" {
		t.Errorf("after another start the condition is %q", message)
	}
}

// A second CA, with a ledger of its own, comes to the database of one that is there, or
// to a copy of it: it says what is wrong and what to do, touches nothing, and the first
// goes on. Only when an operator says so does a database belong to another ledger.
func TestFault_F21_DatabaseOfAnotherLedger(t *testing.T) {
	t.Parallel()
	require.Root(t)
	first, second := local.StartCA(t, local.CAOptions{}), local.StartCA(t, local.CAOptions{})
	first.Apply(t, entries)
	must(t, second.Stop(t))
	theirs, own := filepath.Join(first.DataDir, "meshid.db"), filepath.Join(second.DataDir, "meshid.db")
	remove := func() {
		t.Helper()
		for _, suffix := range []string{"", "-wal", "-shm"} {
			if err := os.Remove(own + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	says := func(want ...string) {
		t.Helper()
		why := refusedStart(t, second)
		for _, w := range want {
			if !strings.Contains(why, w) {
				t.Errorf("it does not say %q: %s", w, why)
			}
		}
		first.Apply(t, entries) // it is there, and can write
	}
	remove()
	must(t, os.Symlink(theirs, own))
	says("not a regular file")
	remove()
	must(t, os.Link(theirs, own))
	says("hard link")
	remove()

	keep := second.DataDir + ".own"
	must(t, os.Rename(second.DataDir, keep))
	must(t, os.Symlink(first.DataDir, second.DataDir))
	says("is not a directory")
	must(t, os.Remove(second.DataDir))
	must(t, os.Rename(keep, second.DataDir))

	must(t, first.Stop(t))
	content, err := os.ReadFile(theirs)
	must(t, err)
	first.Start(t)
	first.AwaitReady(t)
	must(t, os.WriteFile(own, content, 0o600))
	for range 2 {
		says("belongs to another ledger", "a data_dir of its own", "ca store accept")
	}
	config := filepath.Join(second.Dir, "ca.yaml")
	roots, err := filepath.Glob(filepath.Join(first.DataDir, "keys", "root-*"))
	must(t, err)
	for _, root := range roots {
		key, err := os.ReadFile(root)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(second.DataDir, "keys", filepath.Base(root)), key, 0o600))
	}
	second.MustCommand(t, "store", "accept", "--config", config)
	second.Start(t)
	second.AwaitReady(t)
	if message := unrecorded(t, second); message != "" {
		t.Errorf("the condition is %q", message)
	}
	local.Await(t, "find the record of the acceptance", func(context.Context) error {
		out, err := second.Command(t, "ledger", "find", "--event", "store_accepted", "-o", "jsonl")
		if err == nil && !strings.Contains(out, "had belonged to the ledger") {
			err = fmt.Errorf("found is %s", out)
		}
		return err
	})
	must(t, second.Stop(t))
	if out, err := second.Command(t, "store", "accept", "--config", config); err == nil || !strings.Contains(err.Error(), "nothing to accept") {
		t.Errorf("it is accepted again: %s %v", out, err)
	}
}

// A root is put into the database by hand: the CA does not start with it, and no
// agent ever sees it.
func TestV_G9_RootAddedByHand(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca, other := local.StartCA(t, local.CAOptions{}), local.StartCA(t, local.CAOptions{})
	must(t, ca.Stop(t))
	var der []byte
	db, err := sql.Open("sqlite", "file:"+filepath.Join(other.DataDir, "meshid.db")+"?mode=ro")
	must(t, err)
	must(t, db.QueryRowContext(t.Context(), `SELECT certificate FROM roots`).Scan(&der))
	must(t, db.Close())
	edit(t, ca, `INSERT INTO roots (certificate, key_ref, state, created_at, since, sequence, automatic, tainted)
		SELECT ?1, key_ref, 'prepared', created_at, since, sequence, automatic, tainted FROM roots`, der)
	if why := refusedStart(t, ca); !strings.Contains(why, "never recorded") {
		t.Errorf("it says %s", why)
	}
	edit(t, ca, `DELETE FROM roots WHERE certificate = ?1`, der)
	ca.Start(t)
	ca.AwaitReady(t)
}

// The database is restored from an older copy: the CA does not start and says what
// is lost, until an operator accepts it; then agents follow it.
func TestV_L8_F16_StoreRestoredFromACopy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, bob, w.agent)
	must(t, w.ca.Stop(t))
	path := filepath.Join(w.ca.DataDir, "meshid.db")
	older, err := os.ReadFile(path)
	must(t, err)
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	w.ca.MustCommand(t, "entry", "delete", "bob")
	w.ca.Apply(t, "- {name: mallory, spiffe_id: 'spiffe://example.org/mallory', workloads: unix.uid == 23003}\n")
	awaitAs(t, mallory, w.agent, "spiffe://example.org/mallory")
	must(t, w.ca.Stop(t))
	newer, err := os.ReadFile(path)
	must(t, err)

	put := func(content []byte) {
		t.Helper()
		for _, suffix := range []string{"-wal", "-shm"} {
			if err := os.Remove(path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		must(t, os.WriteFile(path, content, 0o600))
	}
	config := filepath.Join(w.ca.Dir, "ca.yaml")
	if out, err := w.ca.Command(t, "store", "accept", "--config", config); err == nil || !strings.Contains(err.Error(), "nothing to accept") {
		t.Errorf("a store that is not behind is accepted: %s %v", out, err)
	}
	put(older)
	for range 2 {
		why := refusedStart(t, w.ca)
		for _, want := range []string{"older than the ledger", "entry bob deleted", "entry mallory applied", "ca store accept"} {
			if !strings.Contains(why, want) {
				t.Errorf("it does not say %q: %s", want, why)
			}
		}
	}
	// Another copy is as good as none.
	put(nil)
	if why := refusedStart(t, w.ca); !strings.Contains(why, "older than the ledger") {
		t.Errorf("of an empty database it says %s", why)
	}
	// With the newest one back, all is as before.
	put(newer)
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	w.agent.AwaitConnected(t)
	must(t, w.ca.Stop(t))

	put(older)
	w.ca.MustCommand(t, "store", "accept", "--config", config)
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	if message := unrecorded(t, w.ca); message != "" {
		t.Errorf("the condition is %q", message)
	}
	w.agent.AwaitConnected(t)
	awaitAs(t, bob, w.agent, "spiffe://example.org/bob")
	local.Await(t, "wait until mallory's entry is gone", func(context.Context) error {
		out, err := as(t, mallory, "fetch", w.agent.Socket).CombinedOutput()
		if err == nil {
			return fmt.Errorf("mallory got %s", out)
		}
		return nil
	})
	local.Await(t, "find the record of the acceptance", func(context.Context) error {
		out, err := w.ca.Command(t, "ledger", "find", "--event", "store_accepted", "-o", "jsonl")
		for _, want := range []string{`"actor":"uid:0"`, `"lost":["entry bob deleted`, "entry mallory applied"} {
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("%s is not in %s", want, out)
			}
		}
		return err
	})
	w.sound(t)
}

// All of the data folder is restored from an older copy, ledger and database alike, which
// nothing in it can tell. Agents were told more, and do not follow a CA that takes that back
// until an operator says that it was restored; then they have what it has.
func TestV_L8_F16_DataFolderRestoredFromACopy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, bob, w.agent)
	must(t, w.ca.Stop(t))
	older := filepath.Join(t.TempDir(), "copy")
	must(t, os.CopyFS(older, os.DirFS(w.ca.DataDir)))
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	w.ca.MustCommand(t, "entry", "delete", "bob")
	w.ca.Apply(t, "- {name: mallory, spiffe_id: 'spiffe://example.org/mallory', workloads: unix.uid == 23003}\n")
	awaitAs(t, mallory, w.agent, "spiffe://example.org/mallory")
	must(t, w.ca.Stop(t))
	must(t, os.RemoveAll(w.ca.DataDir))
	must(t, os.CopyFS(w.ca.DataDir, os.DirFS(older)))
	must(t, filepath.WalkDir(w.ca.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o700)
		} else if err == nil {
			err = os.Chmod(path, 0o600)
		}
		return err
	}))

	// Without a word, the agent goes on with what it was told.
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	local.Await(t, "the CA says so", func(context.Context) error {
		if log := w.ca.Log(); !strings.Contains(log, "an agent was told more than this ca knows") || !strings.Contains(log, "ca store accept --restored") {
			return errors.New("it does not")
		}
		return nil
	})
	must(t, w.ca.Stop(t))

	config := filepath.Join(w.ca.Dir, "ca.yaml")
	if out, err := w.ca.Command(t, "store", "accept", "--config", config); err == nil || !strings.Contains(err.Error(), "--restored") {
		t.Errorf("it is not said how: %s %v", out, err)
	}
	w.ca.MustCommand(t, "store", "accept", "--config", config, "--restored", "tuesday")
	for range 2 { // once, also when it has been in use
		if out := w.ca.MustCommand(t, "store", "accept", "--config", config, "--restored", "tuesday"); !strings.Contains(out, "nothing to do") {
			t.Errorf("again: %s", out)
		}
		w.ca.Start(t)
		w.ca.AwaitReady(t)
		w.agent.AwaitConnected(t)
		awaitAs(t, bob, w.agent, "spiffe://example.org/bob")
		w.ca.Apply(t, "- {name: alice-2, spiffe_id: 'spiffe://example.org/alice-2', workloads: unix.uid == 23001}\n")
		must(t, w.ca.Stop(t))
	}
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	w.agent.AwaitConnected(t)
	local.Await(t, "wait until mallory's entry is gone", func(context.Context) error {
		out, err := as(t, mallory, "fetch", w.agent.Socket).CombinedOutput()
		if err == nil {
			return fmt.Errorf("mallory got %s", out)
		}
		return nil
	})
	if out := w.ca.MustCommand(t, "ledger", "find", "--event", "store_accepted", "-o", "jsonl"); strings.Count(out, "\n") != 1 || !strings.Contains(out, "tuesday") {
		t.Errorf("recorded is %s", out)
	}
	w.sound(t)
}
