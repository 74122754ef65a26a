package cache

import (
	"bufio"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/pkg/identity"
)

var update = flag.Bool("update", false, "write the transcripts as they are now")

var testTD = spiffeid.RequireTrustDomainFromString("example.org")

// world is a cache with the entries, the clock and the requests of a transcript.
type world struct {
	t       testing.TB
	config  Config
	cache   *Cache
	now     time.Time
	start   time.Time
	room    int
	entries *identity.Set
	staged  []string // names changed since the last apply
	facts   map[string]*identity.Facts
	open    map[uint64]Request
	serials int64
	node    *attributesv1.Node
}

func newWorld(t testing.TB, config Config) *world {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	return &world{
		t: t, config: config, cache: New(config), now: start, start: start, room: 100,
		entries: identity.NewSet(), facts: make(map[string]*identity.Facts), open: make(map[uint64]Request),
		node: &attributesv1.Node{Method: "join_token", Id: "n1"},
	}
}

// TestTranscripts runs testdata/*.txt. A line that begins with "> " is a command
// (see world.run); the lines below it are what the cache wants done then. Run
// with -update to write the files anew, and read the difference.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			w := newWorld(t, Config{})
			lines := bufio.NewScanner(strings.NewReader(string(want)))
			for lines.Scan() {
				switch line := lines.Text(); {
				case strings.HasPrefix(line, "#"), line == "":
					fmt.Fprintln(&got, line)
				case strings.HasPrefix(line, "> "):
					fmt.Fprintln(&got, line)
					got.WriteString(w.run(strings.Fields(line[2:])))
				}
			}
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("transcript differs (-want +got):\n%s", diff)
			}
		})
	}
}

// run carries out a command:
//
//	config key=value…        a new cache with these bounds
//	entry NAME PATH RULE     stage an entry, RULE being uid=N, app=X or all; also hint=H dns=N
//	remove NAME              stage a removal
//	apply | snapshot         put what was staged into force, as a delta or in whole
//	bundle SEQUENCE ROOT…    put a bundle with these roots into force
//	attach WATCH INSTANCE k=v…   k being uid, gid or app; attributes of the process
//	detach WATCH             announce INSTANCE k=v…          end INSTANCE
//	issue REQUEST [ttl=D] [by=AUTHORITY] [root=ROOT] [as=PATH]
//	refuse REQUEST [DURATION]   fail REQUEST     rotate AUTHORITY|all DURATION
//	quarantine PATH|SERIAL…  all that is quarantined
//	wait DURATION            evict    resume     restart     room N     node LABEL
func (w *world) run(args []string) string {
	var out strings.Builder
	options := make(map[string]string)
	var words []string
	for _, a := range args[1:] {
		if k, v, ok := strings.Cut(a, "="); ok {
			options[k] = v
		} else {
			words = append(words, a)
		}
	}
	word := func(n int) string {
		if n >= len(words) {
			w.t.Fatalf("%q: word %d is missing", args, n)
		}
		return words[n]
	}
	switch args[0] {
	case "config":
		w.config = Config{
			MaxInstances: w.int(options["instances"]), MaxIdentities: w.int(options["identities"]), MaxWorkloads: w.int(options["workloads"]),
		}
		w.cache = New(w.config)
	case "entry":
		e := &entryv1.Entry{Name: word(0), SpiffeId: "spiffe://example.org" + word(1), AcceptWeak: true, Hint: options["hint"]}
		switch {
		case options["uid"] != "":
			e.Workloads = "unix.uid == " + options["uid"]
		case options["app"] != "":
			e.Workloads = fmt.Sprintf(`docker.labels["app"] == %q`, options["app"])
		case options["label"] != "":
			e.Workloads = fmt.Sprintf(`node.labels["l"] == %q`, options["label"])
		default:
			e.Workloads = `unix.uid >= 0 || docker.container_id != ""`
		}
		if options["dns"] != "" {
			e.DnsNames = []string{options["dns"]}
		}
		c, err := identity.Compile(testTD, e)
		if err != nil {
			w.t.Fatal(err)
		}
		w.entries = w.entries.With([]*identity.Entry{c}, nil)
		w.staged = append(w.staged, e.GetName())
		return ""
	case "remove":
		w.entries = w.entries.With(nil, []string{word(0)})
		w.staged = append(w.staged, word(0))
		return ""
	case "apply":
		w.cache.SetEntries(w.now, w.entries, append([]string{}, w.staged...))
		w.staged = nil
	case "snapshot":
		w.cache.SetEntries(w.now, w.entries, nil)
		w.staged = nil
	case "node":
		w.node = &attributesv1.Node{Method: "join_token", Id: "n1", Labels: map[string]string{"l": word(0)}}
		w.cache.Replace(w.now, w.entries, func(_, digest string) *identity.Facts {
			return identity.NewFacts(w.node, attributes(w.t, digest))
		})
	case "bundle":
		b := &identity.Bundle{TrustDomain: testTD, Sequence: uint64(w.int(word(0)))}
		for _, name := range words[1:] {
			b.Roots = append(b.Roots, &x509.Certificate{RawSubject: []byte(name), SubjectKeyId: []byte(name)})
		}
		w.cache.SetBundle(w.now, b)
	case "attach":
		if err := w.cache.Attach(w.now, WatchID(w.int(word(0))), w.workload(word(1), options)); err != nil {
			fmt.Fprintf(&out, "  error: %v\n", err)
		}
	case "detach":
		w.cache.Detach(w.now, WatchID(w.int(word(0))))
	case "announce":
		stale, err := w.cache.Announce(w.now, w.workload(word(0), options))
		if err != nil {
			fmt.Fprintf(&out, "  error: %v\n", err)
		}
		if len(stale) > 0 {
			fmt.Fprintf(&out, "  attest again %v\n", stale)
		}
	case "end":
		w.cache.End(w.now, word(0))
	case "issue":
		q, ok := w.open[uint64(w.int(word(0)))]
		if !ok {
			w.t.Fatalf("%q: no such request", args)
		}
		delete(w.open, q.ID)
		ttl := time.Hour
		if options["ttl"] != "" {
			ttl = w.duration(options["ttl"])
		}
		svid := w.svid(q, ttl, options["by"], options["root"])
		if options["as"] != "" {
			svid.ID = spiffeid.RequireFromString("spiffe://example.org" + options["as"])
		}
		if !w.cache.Issued(w.now, q.ID, svid) {
			out.WriteString("  not wanted\n")
		}
	case "refuse":
		retry := time.Duration(-1)
		if len(words) > 1 {
			retry = w.duration(words[1])
		}
		delete(w.open, uint64(w.int(word(0))))
		w.cache.Refused(w.now, uint64(w.int(word(0))), "refused", retry)
	case "fail":
		delete(w.open, uint64(w.int(word(0))))
		w.cache.Failed(w.now, uint64(w.int(word(0))), "failed")
	case "rotate":
		authority := hex.EncodeToString([]byte(word(0)))
		if word(0) == "all" {
			authority = ""
		}
		fmt.Fprintf(&out, "  %d affected\n", w.cache.Rotate(w.now, authority, w.duration(word(1))))
	case "wait":
		w.now = w.now.Add(w.duration(word(0)))
		w.cache.Tick(w.now)
	case "quarantine":
		q := &Quarantine{IDs: make(map[[32]byte]struct{}), Serials: make(map[string]struct{})}
		for _, what := range words {
			if strings.HasPrefix(what, "/") {
				q.IDs[sha256.Sum256([]byte("spiffe://example.org"+what))] = struct{}{}
			} else {
				serial, err := hex.DecodeString(what)
				if err != nil {
					w.t.Fatal(err)
				}
				q.Serials[string(serial)] = struct{}{}
			}
		}
		fmt.Fprintf(&out, "  withdrawn: %d\n", w.cache.SetQuarantine(w.now, q))
	case "evict":
		w.cache.Evict(w.now)
	case "resume":
		w.cache.Resume(w.now)
	case "restart":
		records := w.cache.Export()
		entries, bundle := w.cache.entries, w.cache.bundle
		w.cache = New(w.config)
		w.open = make(map[uint64]Request)
		w.cache.SetBundle(w.now, bundle)
		w.cache.Restore(w.now, records)
		w.cache.SetEntries(w.now, entries, nil)
	case "room":
		w.room = w.int(word(0))
		return ""
	default:
		w.t.Fatalf("no such command: %q", args)
	}
	w.show(&out)
	return out.String()
}

// show writes what the cache wants done.
func (w *world) show(out *strings.Builder) {
	r := w.cache.Ready(w.now, w.room)
	for _, q := range r.Issue {
		w.open[q.ID] = q
		fmt.Fprintf(out, "  request %d: %s %s for %s", q.ID, q.Kind, q.Identity.ID.Path(), q.Instance)
		if q.PreviousSerial != nil {
			fmt.Fprintf(out, " replacing %x", q.PreviousSerial)
		}
		fmt.Fprintf(out, " under %s\n", q.Identity.Entry.Name())
	}
	if r.Waiting > 0 {
		fmt.Fprintf(out, "  %d wait for room\n", r.Waiting)
	}
	for _, p := range r.Publish {
		fmt.Fprintf(out, "  publish to %v: %s\n", p.Watches, describe(p.Snapshot))
	}
	if len(r.Closed) > 0 {
		fmt.Fprintf(out, "  close %v\n", r.Closed)
	}
	for _, e := range r.Ended {
		fmt.Fprintf(out, "  ended %s with %x\n", e.Instance, e.Serials)
	}
	for _, e := range r.Events {
		fmt.Fprintf(out, "  event %s: %s, entry %s\n", e.Kind, e.Instance, e.Entry)
	}
	if r.Changed {
		out.WriteString("  save\n")
	}
	if !r.Next.IsZero() {
		fmt.Fprintf(out, "  next at %v\n", r.Next.Sub(w.start))
	}
}

func describe(s *identity.Snapshot) string {
	var parts []string
	for _, v := range s.SVIDs {
		p := fmt.Sprintf("%s(%x)", v.ID.Path(), v.Chain[0].SerialNumber)
		if v.Hint != "" {
			p += " hint " + v.Hint
		}
		parts = append(parts, p)
	}
	out := "[" + strings.Join(parts, ", ") + "]"
	if len(s.Withdrawn) > 0 {
		var lost []string
		for _, id := range s.Withdrawn {
			lost = append(lost, id.Path())
		}
		out += " withdrawn [" + strings.Join(lost, ", ") + "]"
	}
	if s.Denied {
		out += " denied"
	}
	return out + fmt.Sprintf(" bundle %d", s.Bundle.Sequence)
}

// workload makes a workload; its digest is its attributes in writing.
func (w *world) workload(instance string, options map[string]string) Workload {
	var parts []string
	for _, k := range []string{"uid", "gid", "app"} {
		if v, ok := options[k]; ok {
			parts = append(parts, k+"="+v)
		}
	}
	digest := strings.Join(parts, " ")
	return Workload{Instance: instance, Digest: digest, Facts: identity.NewFacts(w.node, attributes(w.t, digest))}
}

func attributes(t testing.TB, digest string) *attributesv1.Workload {
	a := &attributesv1.Workload{}
	for f := range strings.FieldsSeq(digest) {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "uid", "gid":
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			if a.Unix == nil {
				a.Unix = &attributesv1.Unix{}
			}
			if k == "uid" {
				a.Unix.Uid = n
			} else {
				a.Unix.Gid = n
			}
		default:
			a.Docker = &attributesv1.Docker{ContainerId: "c", Labels: map[string]string{k: v}}
		}
	}
	return a
}

// svid makes an SVID that answers a request. Nothing in it is signed: the cache
// only reads.
func (w *world) svid(q Request, ttl time.Duration, by, root string) *identity.SVID {
	if by == "" {
		by = "ca1"
	}
	if root == "" {
		root = "root1"
	}
	w.serials++
	return &identity.SVID{
		ID: q.Identity.ID, Hint: q.Identity.Hint, Entry: q.Identity.Entry.Name(),
		Chain: []*identity.Certificate{
			{
				SerialNumber: big.NewInt(0x1000 + w.serials), NotBefore: w.now, NotAfter: w.now.Add(ttl),
				AuthorityKeyId: []byte(by),
			},
			{SerialNumber: big.NewInt(1), RawIssuer: []byte(root), AuthorityKeyId: []byte(root)},
		},
		RenewAt: w.now.Add(ttl / 2),
	}
}

func (w *world) int(s string) int {
	if s == "" {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func (w *world) duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// TestFault_F46_RenewalWithSkewedClock: between two clocks that differ, the life that
// an SVID has is what counts.
func TestFault_F46_RenewalWithSkewedClock(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	for _, tc := range []struct {
		name              string
		renewAt, notAfter time.Time
		want              time.Duration
	}{
		{"as the CA says", at(30 * time.Minute), at(time.Hour), 30 * time.Minute},
		{"early as the CA says", at(20 * time.Minute), at(time.Hour), 20 * time.Minute},
		{"two thirds", at(40 * time.Minute), at(time.Hour), 40 * time.Minute},
		{"CA's clock is 35 minutes behind", at(-5 * time.Minute), at(25 * time.Minute), 7*time.Minute + 30*time.Second},
		{"CA's clock is a day ahead", at(24*time.Hour + 30*time.Minute), at(25 * time.Hour), 90 * time.Minute},
		{"renewal after the end", at(2 * time.Hour), at(time.Hour), 30 * time.Minute},
		{"no renewal time", time.Time{}, at(time.Hour), 30 * time.Minute},
		{"nearly over", at(-50 * time.Minute), at(10 * time.Minute), 5 * time.Minute},
		{"over", at(-time.Hour), at(-time.Minute), time.Second},
	} {
		if got := RenewIn(now, tc.renewAt, tc.notAfter); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestFault_F46_DeadlineHasTwoClocks: a machine that slept is late by its wall clock, one
// whose clock was set back by its monotonic clock.
func TestFault_F46_DeadlineHasTwoClocks(t *testing.T) {
	now := time.Now()
	d := deadline(now.Add(time.Hour))
	if !d.after(now) || d.after(now.Add(time.Hour)) {
		t.Error("neither clock was touched")
	}
	// Without a monotonic reading, this is how a sleep looks: only the wall
	// clock went on.
	if d.after(now.Round(0).Add(2 * time.Hour)) {
		t.Error("the wall clock says that it has come")
	}
}

// TestBoundOfLost: what was lost is remembered up to a bound.
func TestBoundOfLost(t *testing.T) {
	w := &workload{}
	for n := range 3 * maxLost {
		w.lose(spiffeid.RequireFromPath(testTD, fmt.Sprint("/", n)))
	}
	if len(w.lost) != maxLost || w.lost[maxLost-1].Path() != fmt.Sprint("/", 3*maxLost-1) {
		t.Errorf("%d are remembered, the last is %v", len(w.lost), w.lost[len(w.lost)-1])
	}
	if !slices.IsSortedFunc(w.lost, func(a, b spiffeid.ID) int { return len(a.Path()) - len(b.Path()) }) {
		t.Error("order was not kept")
	}
}
