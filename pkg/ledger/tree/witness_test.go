package tree

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// strictWitness is a witness as C2SP tlog-witness describes it, for one log.
type strictWitness struct {
	t    testing.TB
	name string
	key  ed25519.PrivateKey

	mu      sync.Mutex // guards what follows
	log     note.Verifier
	size    uint64
	root    [32]byte
	answers int
	instead func(w http.ResponseWriter) // answers in its place, if it is not nil
}

func newStrictWitness(t testing.TB, name string) (*strictWitness, Witness) {
	t.Helper()
	w := &strictWitness{t: t, name: name, key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte(name[:1]), ed25519.SeedSize))}
	srv := httptest.NewServer(w)
	t.Cleanup(srv.Close)
	client, err := NewWitness(srv.URL+"/prefix/", w.vkey())
	if err != nil {
		t.Fatal(err)
	}
	return w, client
}

func (w *strictWitness) public() []byte {
	public, ok := w.key.Public().(ed25519.PublicKey)
	if !ok {
		w.t.Fatal("no public key")
	}
	return append([]byte{algCosignature}, public...)
}

func (w *strictWitness) vkey() string {
	return fmt.Sprintf("%s+%08x+%s", w.name, keyHash(w.name, w.public()), base64.StdEncoding.EncodeToString(w.public()))
}

func (w *strictWitness) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *strictWitness) asked() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answers
}

// ServeHTTP implements add-checkpoint.
func (w *strictWitness) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answers++
	if w.instead != nil {
		w.instead(out)
		return
	}
	if w.log == nil {
		http.Error(out, "an unknown log", http.StatusNotFound)
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/prefix/add-checkpoint" {
		http.Error(out, "no such call", http.StatusNotFound)
		return
	}
	body, err := io.ReadAll(r.Body)
	head, signed, ok := bytes.Cut(body, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	old, perr := strconv.ParseUint(strings.TrimPrefix(lines[0], "old "), 10, 64)
	if err != nil || !ok || perr != nil || len(lines) > 64 || lines[0] != fmt.Sprintf("old %d", old) {
		http.Error(out, "not a request", http.StatusBadRequest)
		return
	}
	c, err := ParseCheckpoint(signed, w.log)
	if err != nil {
		http.Error(out, err.Error(), http.StatusForbidden)
		return
	}
	var proof tlog.TreeProof
	for _, line := range lines[1:] {
		h, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(h) != 32 {
			http.Error(out, "not a proof", http.StatusBadRequest)
			return
		}
		proof = append(proof, tlog.Hash(h))
	}
	switch {
	case old > c.Size:
		http.Error(out, "old", http.StatusBadRequest)
		return
	case old != w.size, old == c.Size && old > 0 && c.Root != w.root:
		out.Header().Set("Content-Type", sizeContentType)
		out.WriteHeader(http.StatusConflict)
		fmt.Fprintf(out, "%d\n", w.size)
		return
	case old > 0 && old < c.Size && tlog.CheckTree(proof, int64(c.Size), c.Root, int64(old), w.root) != nil,
		(old == 0 || old == c.Size) && len(proof) > 0:
		http.Error(out, "proof", http.StatusUnprocessableEntity)
		return
	}
	w.size, w.root = c.Size, c.Root
	text, _, _ := bytes.Cut(signed, []byte("\n\n"))
	_, _ = out.Write(w.cosign(string(text)+"\n", uint64(time.Now().Unix())))
}

// cosign returns a signature line.
func (w *strictWitness) cosign(text string, at uint64) []byte {
	sig := ed25519.Sign(w.key, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at, text))
	b := binary.BigEndian.AppendUint32(nil, keyHash(w.name, w.public()))
	b = binary.BigEndian.AppendUint64(b, at)
	return fmt.Appendf(nil, "— %s %s\n", w.name, base64.StdEncoding.EncodeToString(append(b, sig...)))
}

// begin starts the tree with a key that the witnesses know.
func (e *env) begin(witnesses ...*strictWitness) {
	e.t.Helper()
	e.open()
	for _, w := range witnesses {
		w.set(func() { w.log = e.tree.key.verifier })
	}
	e.done = make(chan error, 1)
	go func() { e.done <- e.tree.Run(context.Background()) }()
}

func cosigners(c Checkpoint) []string {
	slices.Sort(c.Cosigned)
	return c.Cosigned
}

// TestWitnesses cosigns with two witnesses, over growth and restarts.
func TestWitnesses(t *testing.T) {
	t.Parallel()
	w1, c1 := newStrictWitness(t, "a.example")
	w2, c2 := newStrictWitness(t, "b.example")
	e := newEnv(t)
	e.options.Witnesses = []Witness{c1, c2}
	for range 3 {
		e.begin(w1, w2)
		for _, n := range []int{0, 1, 300, 0} {
			e.append(n)
			e.await("two cosignatures", func() bool {
				c := e.tree.Checkpoint()
				return c.Size == e.journal.Size() && len(c.Cosigned) == 2
			})
		}
		if d := e.tree.unwitnessed(time.Now()); d != 0 {
			t.Errorf("unwitnessed for %v", d)
		}
		e.stop()
	}
	v := e.verifier()
	v.Witnesses = []note.Verifier{c1.key, c2.key}
	r, err := v.Verify(t.Context(), e.treeDir(), e.journalDir())
	if err != nil || fmt.Sprint(cosigners(r.Published)) != "[a.example b.example]" {
		t.Errorf("%v, %v", r.Published.Cosigned, err)
	}
	p, err := Prove(e.treeDir(), r.Published, 42)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := p.Check(v.Key, v.Witnesses...); err != nil || len(c.Cosigned) != 2 {
		t.Errorf("a proof under %v, %v", c.Cosigned, err)
	}
}

// TestFault_F67_WitnessDown stops a witness: the journal and the checkpoints go on,
// the age without cosignatures grows and is a condition, and when the witness is
// back, all heals.
func TestFault_F67_WitnessDown(t *testing.T) {
	t.Parallel()
	for name, instead := range map[string]func(w http.ResponseWriter){
		"error":            func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
		"unknown log":      func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"another key":      func(w http.ResponseWriter) { w.WriteHeader(http.StatusForbidden) },
		"elsewhere":        func(w http.ResponseWriter) { w.Header().Set("Location", "/x"); w.WriteHeader(http.StatusFound) },
		"hangs up":         func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
		"nonsense":         func(w http.ResponseWriter) { fmt.Fprint(w, "— a.example AAAA\n") },
		"nothing":          func(http.ResponseWriter) {},
		"more than enough": func(w http.ResponseWriter) { fmt.Fprint(w, strings.Repeat("x", 1<<20)) },
		"conflict":         func(w http.ResponseWriter) { w.WriteHeader(http.StatusConflict); fmt.Fprint(w, "soon\n") },
		"signed by others": func(w http.ResponseWriter) {
			other := &strictWitness{name: "a.example", key: ed25519.NewKeyFromSeed(make([]byte, 32))}
			_, _ = w.Write(other.cosign("x\n", 1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, c := newStrictWitness(t, "a.example")
			e := newEnv(t)
			e.options.Witnesses = []Witness{c}
			e.options.witnessRetry = e.options.retry
			e.begin(w)
			e.append(10)
			e.await("a cosignature", func() bool { return e.tree.Checkpoint().Size == 10 && len(e.tree.Checkpoint().Cosigned) == 1 })
			w.set(func() { w.instead = instead })
			n := w.asked()
			e.append(10)
			e.covered() // the checkpoint does not wait
			e.await("an attempt", func() bool { return w.asked() > n })
			if e.tree.Halted() != nil || len(e.tree.Checkpoint().Cosigned) != 0 {
				t.Fatalf("halted: %v, cosigned by %v", e.tree.Halted(), e.tree.Checkpoint().Cosigned)
			}
			later := time.Now().Add(2 * time.Minute)
			e.tree.unwitnessed(time.Now()) // as a look at the metrics does
			if err := e.tree.WitnessHealth(later); err == nil {
				t.Error("no condition")
			}
			if warning, failure := e.tree.Health(later); warning != nil || failure != nil {
				t.Errorf("health: %v, %v", warning, failure)
			}
			w.set(func() { w.instead = nil })
			e.await("a cosignature", func() bool { return len(e.tree.Checkpoint().Cosigned) == 1 })
			e.await("no condition", func() bool { return e.tree.WitnessHealth(time.Now()) == nil })
		})
	}
}

// TestQuorum publishes nothing before enough witnesses have cosigned.
func TestQuorum(t *testing.T) {
	t.Parallel()
	w1, c1 := newStrictWitness(t, "a.example")
	w2, c2 := newStrictWitness(t, "b.example")
	_, c3 := newStrictWitness(t, "c.example") // does not know the log
	e := newEnv(t)
	e.options.Witnesses, e.options.Quorum = []Witness{c1, c2, c3}, 2
	e.options.witnessRetry = e.options.retry
	e.begin(w1, w2)
	e.append(300)
	c := e.covered()
	if fmt.Sprint(cosigners(c)) != "[a.example b.example]" {
		t.Errorf("cosigned by %v", c.Cosigned)
	}
	w2.set(func() { w2.instead = func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) } })
	n := w2.asked()
	e.append(300)
	e.await("attempts", func() bool { return w2.asked() > n+1 })
	if got := e.tree.Checkpoint(); got.Size != 300 {
		t.Errorf("a checkpoint of %d records was published", got.Size)
	}
	// Restarted in this state, it goes on.
	e.stop()
	w2.set(func() { w2.instead = nil })
	e.begin(w1, w2)
	if c := e.covered(); c.Size != 600 || len(c.Cosigned) != 2 {
		t.Errorf("%d records, cosigned by %v", c.Size, c.Cosigned)
	}
	e.stop()
	e.verify()
	if _, err := Open(e.treeDir(), nil, Options{Quorum: 1}); err == nil {
		t.Error("a quorum without witnesses")
	}
}

// TestV_J6_WitnessSeesRollback restores an older copy of a whole ledger, which is
// sound by itself: the witness knows better, and nothing more is signed.
func TestV_J6_WitnessSeesRollback(t *testing.T) {
	t.Parallel()
	w, c := newStrictWitness(t, "a.example")
	e := newEnv(t)
	e.options.Witnesses = []Witness{c}
	e.begin(w)
	e.append(10)
	e.await("a cosignature", func() bool { return e.tree.Checkpoint().Size == 10 && len(e.tree.Checkpoint().Cosigned) == 1 })
	e.stop()
	old := copyTree(t, e.dir)
	for name, tc := range map[string]struct {
		ahead int
		away  bool // the witness, at the start
	}{
		"behind":           {0, false},
		"forked":           {25, false},
		"forked, and late": {25, true},
	} {
		e.begin(w)
		e.append(10)
		e.await("a cosignature", func() bool { c := e.tree.Checkpoint(); return c.Size == e.journal.Size() && len(c.Cosigned) == 1 })
		e.stop()
		restored := &env{t: t, dir: copyTree(t, old), options: e.options, count: 70_000}
		restored.options.Key = filepath.Join(restored.dir, "keys", "log.key")
		restored.options.witnessRetry = e.options.retry
		if tc.ahead > 0 {
			restored.open()
			restored.append(tc.ahead)
			restored.stop()
		}
		before := contents(t, restored.treeDir())
		if tc.away {
			w.set(func() { w.instead = func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) } })
			restored.begin(w)
			restored.append(50)
			restored.covered()
			w.set(func() { w.instead = nil })
		} else {
			restored.begin(w)
		}
		restored.await("the end of signing", func() bool { return restored.tree.Halted() != nil })
		if err := restored.tree.Halted(); !strings.Contains(err.Error(), "witness a.example") {
			t.Errorf("%s: %v", name, err)
		}
		restored.append(3) // the journal goes on
		restored.stop()
		if !tc.away && contents(t, restored.treeDir()) != before {
			t.Errorf("%s: something was signed before the witness was asked", name)
		}
	}
}

func TestParseWitnessKey(t *testing.T) {
	t.Parallel()
	w, _ := newStrictWitness(t, "a.example")
	key := w.public()
	key[0] = algEd25519 // as some print it
	announced := fmt.Sprintf("a.example+%08x+%s", keyHash("a.example", key), base64.StdEncoding.EncodeToString(key))
	for _, good := range []string{w.vkey(), announced, w.vkey() + "\n"} {
		if v, err := ParseWitnessKey(good); err != nil || v.KeyHash() != keyHash(w.name, w.public()) {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "a", "a+b", "a.example+00000000+" + base64.StdEncoding.EncodeToString(key), w.vkey()[1:], w.vkey() + "A", "a+zzzzzzzz+AAAA", "+" + w.vkey()} {
		if _, err := ParseWitnessKey(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	for _, bad := range []string{"", "ftp://x", "https://", "https://x?y", "x"} {
		if _, err := NewWitness(bad, w.vkey()); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
