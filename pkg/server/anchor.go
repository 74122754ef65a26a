package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// ErrStoreBehind is wrapped when the store is older than what this CA has already
// recorded and told: it was restored from a copy.
var ErrStoreBehind = errors.New("the store is older than the ledger: it was restored from a copy, or replaced")

// ErrStoreForeign is wrapped when the store belongs to another ledger than this CA's.
var ErrStoreForeign = errors.New("the database belongs to another ledger than the one in this CA's data folder")

// ErrUnrecordedRoot is wrapped when the store has a root that no record of the
// ledger speaks of.
var ErrUnrecordedRoot = errors.New("the store has a root that the CA never recorded")

// lookForChanges bounds the search for what a store that is behind has lost.
const lookForChanges = 30 * time.Second

// maxAnchorBytes bounds the file: maxEntries names with their hashes, and nodes.
const maxAnchorBytes = 64 << 20

// TrustStore is what an Anchor needs of a store; *store.DB has it.
type TrustStore interface {
	Entries(ctx context.Context) (entries []*entryv1.Entry, revision uint64, err error)
	Trust(ctx context.Context) (ca.Trust, error)
	Nodes(ctx context.Context) ([]*registry.Node, error)
	Quarantines(ctx context.Context) ([]*registry.Quarantine, error)
	Tokens(ctx context.Context, now time.Time) ([]*registry.Token, error)
	DeleteToken(ctx context.Context, sum [32]byte, record func() error) error
	Epoch() string
	// Ledger returns the name of the ledger that the store belongs to, "" if to none.
	Ledger(ctx context.Context) (journal string, err error)
	// ClaimLedger has the store belong to a ledger if it belongs to none, and returns
	// the one that it belongs to.
	ClaimLedger(ctx context.Context, journal string) (owner string, err error)
}

// Anchor is what the CA knows of its store without the store: a small file beside
// the ledger with the last revision that was told to anybody, the hash of each
// entry, root, attested node and open join token that was recorded, and the bans and
// quarantines that are in force. The store's rows are a copy of what the ledger says, and a row that
// the ledger does not know of is not believed: whoever can write to the store can
// stop the CA, and can neither have it issue nor lift what an operator withdrew.
//
// A change is recorded first, then committed to the store, then noted here. So
// whatever is noted here must be in the store, and what the store has beyond it
// must be in the records since. (A ban and a quarantine are in the store first: there
// is no harm in believing one that is not recorded.)
type Anchor struct {
	path    string
	journal *ledger.Journal
	version string

	// wanted is what nodes, quarantines and join tokens were when the CA stopped; nil
	// if nobody knows. It is not changed.
	wanted *wanted
	// restored names the copy that was accepted last for all of the data folder. It is not
	// changed.
	restored string

	mu         sync.Mutex               // held while the file is written; guards what follows
	unrecorded map[string]string        // entries not to be believed, by name → why
	missing    map[string]string        // recorded entries that are not in the store, by name → digest
	edited     []string                 // what was not believed of nodes, quarantines and tokens, for a person; the first of it
	edits      int                      // how much that was
	tokens     map[string]anchoredToken // join tokens that can be used, by SHA-256
	kept       *anchored                // what the file says; not changed
}

// unrecordedEntry says why an entry of the store is not to be believed, if so. A
// nil Anchor believes all.
func (a *Anchor) unrecordedEntry(name string) (why string, not bool) {
	if a == nil {
		return "", false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	why, not = a.unrecorded[name]
	return why, not
}

// unrecordedOf counts those of the entries that are not to be believed.
func (a *Anchor) unrecordedOf(entries map[string]*entryv1.Entry) (n int) {
	for name := range entries {
		if _, not := a.unrecordedEntry(name); not {
			n++
		}
	}
	return n
}

// differences names the entries that are not in force as they were recorded.
func (a *Anchor) differences(entries *registry.Entries) []string {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	names := slices.Collect(maps.Keys(a.missing))
	for name := range entries.Broken {
		if _, not := a.unrecorded[name]; not {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// problem is what is wrong with the store, for an operator; these entries are
// differences. It is empty if nothing is.
func (a *Anchor) problem(entries []string) string {
	if a == nil {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var problems []string
	if len(entries) > 0 {
		problems = append(problems, "these entries are not what the ledger says, and are not in force: "+strings.Join(entries, ", ")+
			". Apply them again, then delete those that are not wanted")
	}
	if a.edits > 0 {
		text := strings.Join(a.edited, ", ")
		if n := a.edits - len(a.edited); n > 0 {
			text += fmt.Sprintf(" and %d more", n)
		}
		problems = append(problems, "this is not in it as it was recorded: "+text+
			". What was recorded holds, and the database is put right; `ca ledger find --event store_edited` has the records, and this is said until the next start")
	}
	if len(problems) == 0 {
		return ""
	}
	return "somebody has written to the database; " + strings.Join(problems, "; ")
}

// maxEdited is how much that was edited is named.
const maxEdited = 8

// noteEdited notes something that is not believed.
func (a *Anchor) noteEdited(what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.edits++; len(a.edited) < maxEdited {
		a.edited = append(a.edited, what)
	}
}

// changed notes that entries were changed by a recorded call.
func (a *Anchor) changed(changes []*change) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ch := range changes {
		delete(a.unrecorded, ch.name())
		delete(a.missing, ch.name())
	}
}

// anchored is the file.
type anchored struct {
	Epoch    string            `json:"epoch"`
	Revision uint64            `json:"revision"`
	Sequence uint64            `json:"bundle_sequence"`
	Records  uint64            `json:"records"` // in the journal when this was written
	Entries  map[string]string `json:"entries"` // name → hexadecimal digest
	Roots    []string          `json:"roots"`   // hexadecimal SHA-256
	Restored string            `json:"restored,omitempty"`

	anchoredNodes
}

// OpenAnchor compares the store with the anchor at path and with the ledger, before
// anything is made of the store. Without an anchor, as at the first start of this
// version, it reads the whole ledger. The error wraps ErrStoreBehind, ErrStoreForeign
// or ErrUnrecordedRoot if the CA must not go on with this store; single entries that
// are not recorded are no error: the server does not put them into force.
//
// version is that of this program: what a node attested is compared with what was
// noted by the same version only, since another one may know other facts.
func OpenAnchor(ctx context.Context, path string, journal *ledger.Journal, st TrustStore, version string) (*Anchor, error) {
	a, err := openAnchor(ctx, path, journal, st, version)
	if err != nil {
		return nil, err
	}
	// Another CA may have come first since it was compared.
	if owner, err := st.ClaimLedger(ctx, LedgerName(journal)); err != nil {
		return nil, err
	} else if owner != LedgerName(journal) {
		return nil, &BehindError{Foreign: owner, Ledger: LedgerName(journal)}
	}
	return a, nil
}

// LedgerName is how a store names a ledger.
func LedgerName(j *ledger.Journal) string {
	name := j.Name()
	return hex.EncodeToString(name[:])
}

// openAnchor returns what it knows also if the store is behind.
func openAnchor(ctx context.Context, path string, journal *ledger.Journal, st TrustStore, version string) (*Anchor, error) {
	a := &Anchor{path: path, journal: journal, version: version, unrecorded: map[string]string{}, missing: map[string]string{}, tokens: map[string]anchoredToken{}}
	kept, err := readAnchor(path)
	if err == nil {
		a.wanted, err = a.wantedNodes(ctx, kept)
	}
	if kept != nil {
		a.restored = kept.Restored
	}
	if err == nil {
		err = a.compare(ctx, kept, st)
	}
	if err != nil {
		return a, fmt.Errorf("compare the store with the ledger: %w", err)
	}
	return a, nil
}

// readAnchor returns nil if there is no file.
func readAnchor(path string) (*anchored, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // that there is none is no error
	}
	if err != nil {
		return nil, err
	}
	if st.Size() > maxAnchorBytes {
		return nil, fmt.Errorf("%s has %d bytes: it was not written by this program", path, st.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	kept := &anchored{}
	if err := json.Unmarshal(b, kept); err != nil {
		return nil, fmt.Errorf("%s is damaged: remove it, and all of the ledger is read instead: %w", path, err)
	}
	return kept, nil
}

// compare judges the store.
func (a *Anchor) compare(ctx context.Context, kept *anchored, st TrustStore) error {
	entries, revision, err := st.Entries(ctx)
	if err != nil {
		return err
	}
	trust, err := st.Trust(ctx)
	if err != nil {
		return err
	}
	var said *recorded
	scan := func() (err error) {
		if said != nil {
			return nil
		}
		from := uint64(0)
		if kept != nil {
			from = min(kept.Records, a.journal.Size())
		}
		said, err = scanRecorded(ctx, a.journal.Dir(), from)
		return err
	}
	if owner, err := st.Ledger(ctx); err != nil {
		return err
	} else if name := LedgerName(a.journal); owner != "" && owner != name {
		if err := scan(); err != nil {
			return err
		}
		foreign := &BehindError{
			Foreign: owner, Ledger: name, Revision: revision, Sequence: trust.Sequence, Epoch: st.Epoch(),
			WantRevision: said.revision, WantSequence: said.sequence,
		}
		if kept != nil {
			foreign.WantRevision, foreign.WantSequence = max(kept.Revision, said.revision), max(kept.Sequence, said.sequence)
		}
		return foreign
	}
	if kept == nil {
		if err := scan(); err != nil {
			return err
		}
		if said.revision == 0 && said.sequence == 0 {
			return nil // a new ledger: whatever is in the store, it begins with
		}
		// The last change may have been recorded and never committed.
		kept = &anchored{Epoch: st.Epoch(), Revision: max(said.revision, 1) - 1, Sequence: max(said.sequence, 1) - 1}
	}
	if st.Epoch() != kept.Epoch || revision < kept.Revision || trust.Sequence < kept.Sequence {
		if err := scan(); err != nil {
			return err
		}
		return &BehindError{
			Revision: revision, Sequence: trust.Sequence, Epoch: st.Epoch(), Changes: a.changesSince(ctx, revision),
			WantRevision: max(kept.Revision, said.revision), WantSequence: max(kept.Sequence, said.sequence), WantEpoch: kept.Epoch,
		}
	}
	for _, der := range trust.Bundle() {
		sum := sha256.Sum256(der)
		if id := hex.EncodeToString(sum[:]); !slices.Contains(kept.Roots, id) {
			if err := scan(); err != nil {
				return err
			}
			if !said.roots[id] {
				return fmt.Errorf("%w: the one with SHA-256 %s. Somebody has written to the database: restore it from a copy", ErrUnrecordedRoot, id)
			}
		}
	}
	return a.compareEntries(kept, entries, scan, &said)
}

// changesSince returns what was recorded after a revision, as far as it is found
// in a reasonable time.
func (a *Anchor) changesSince(ctx context.Context, revision uint64) []string {
	ctx, cancel := context.WithTimeout(ctx, lookForChanges)
	defer cancel()
	said, _ := scanRecorded(ctx, a.journal.Dir(), 0) // an error ends the list, and there is a greater one to report
	return said.since(revision)
}

// compareEntries finds the entries that are not recorded, or missing.
func (a *Anchor) compareEntries(kept *anchored, entries []*entryv1.Entry, scan func() error, said **recorded) error {
	stored := make(map[string]bool, len(entries))
	for _, e := range entries {
		name, sum := e.GetName(), digestText(identity.DigestOf(e))
		stored[name] = true
		if kept.Entries[name] == sum {
			continue
		}
		if err := scan(); err != nil {
			return err
		}
		if !slices.Contains((*said).entries[name], sum) {
			a.unrecorded[name] = "the ledger has no record of this entry as it is in the store"
		}
	}
	for name, sum := range kept.Entries {
		if stored[name] {
			continue
		}
		if err := scan(); err != nil {
			return err
		}
		if !slices.Contains((*said).entries[name], "") {
			a.missing[name] = sum
		}
	}
	return nil
}

func digestText(sum [32]byte) string { return hex.EncodeToString(sum[:]) }

// recorded is what records of a ledger say.
type recorded struct {
	revision, sequence uint64
	// entries are the last two digests of each; "" means that it was deleted.
	// Two, since the last change may have been recorded and never committed.
	entries map[string][]string
	roots   map[string]bool
	changes []string // for a person, with their revisions
	at      []uint64
}

// scanRecorded reads the records from one on. With an error, it returns what it has
// read.
func scanRecorded(ctx context.Context, dir string, from uint64) (*recorded, error) {
	r := &recorded{entries: map[string][]string{}, roots: map[string]bool{}}
	return r, scan(ctx, dir, from, r.take)
}

// scan gives take each record from one on that was not archived.
func scan(ctx context.Context, dir string, from uint64, take func(*ledgerv1.Record)) error {
	archived, err := ledger.Archived(dir)
	if err != nil {
		return err
	}
	for e, err := range ledger.Scan(dir, max(from, archived.Size)) {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		take(e.Record)
	}
	return nil
}

func (r *recorded) take(rec *ledgerv1.Record) {
	sum := ""
	switch rec.GetEvent() {
	case ledgerv1.Event_EVENT_ENTRY_APPLIED, ledgerv1.Event_EVENT_ENTRY_LOADED:
		if rec.GetReason() == reasonEntryUnrecorded {
			return
		}
		sum = digestText(identity.DigestOf(rec.GetDefinition()))
	case ledgerv1.Event_EVENT_ENTRY_DELETED:
	case ledgerv1.Event_EVENT_BUNDLE:
		r.sequence = max(r.sequence, rec.GetBundle().GetSequence())
		for _, root := range rec.GetBundle().GetRoots() {
			r.roots[hex.EncodeToString(root.GetSha256())] = true
		}
		return
	case ledgerv1.Event_EVENT_AUTHORITY:
		if rec.GetAuthority().GetRole() == "root" {
			r.roots[hex.EncodeToString(rec.GetAuthority().GetSha256())] = true
		}
		return
	default:
		return
	}
	name, revision := rec.GetEntry().GetName(), rec.GetEntry().GetRevision()
	r.revision = max(r.revision, revision)
	last := append(r.entries[name], sum)
	if n := len(last); n > 1 && last[n-2] == sum {
		last = last[:n-1]
	}
	r.entries[name] = last[max(0, len(last)-2):]
	if rec.GetEvent() != ledgerv1.Event_EVENT_ENTRY_LOADED {
		action := map[bool]string{true: "deleted", false: "applied"}[sum == ""]
		r.changes = append(r.changes, fmt.Sprintf("entry %s %s at revision %d by %s", name, action, revision, rec.GetActor()))
		r.at = append(r.at, revision)
	}
}

// since returns the changes after a revision.
func (r *recorded) since(revision uint64) []string {
	var all []string
	for i, c := range r.changes {
		if r.at[i] > revision {
			all = append(all, c)
		}
	}
	return all
}

// BehindError says in which way the store is older, or which ledger it belongs to; it
// wraps ErrStoreBehind or ErrStoreForeign.
type BehindError struct {
	Foreign                string // the ledger that the store belongs to; "" if it is older
	Ledger                 string // this CA's ledger
	Revision, WantRevision uint64 // of entries and roots
	Sequence, WantSequence uint64 // of the trust bundle
	Epoch, WantEpoch       string
	Changes                []string // that are in the ledger and not in the store, as far as they were looked for
	copied                 string   // the copy from which ledger and store were restored together
}

// Error names the difference, and what to do.
func (e *BehindError) Error() string {
	var b strings.Builder
	if e.Foreign != "" {
		fmt.Fprintf(&b, "%v: that one is %s, and this one %s", ErrStoreForeign, e.Foreign, e.Ledger)
		b.WriteString("\n  A database has one CA: give this one a data_dir of its own." +
			"\n  If its ledger was lost, put the newest copy of it back; or, if there is none, go on with a new one by `ca store accept`, which records that there was another")
		return b.String()
	}
	fmt.Fprintf(&b, "%v: the store is at revision %d with trust bundle %d, the ledger at %d with %d",
		ErrStoreBehind, e.Revision, e.Sequence, e.WantRevision, e.WantSequence)
	const shown = 10
	for _, c := range e.Changes[:min(len(e.Changes), shown)] {
		b.WriteString("\n  lost: " + c)
	}
	if n := len(e.Changes) - shown; n > 0 {
		fmt.Fprintf(&b, "\n  and %d changes more", n)
	}
	b.WriteString("\n  Put the newest copy of meshid.db back; or, if this one is all there is, accept it with `ca store accept` and apply the entries again")
	return b.String()
}

// Unwrap returns ErrStoreBehind or ErrStoreForeign.
func (e *BehindError) Unwrap() error {
	if e.Foreign != "" {
		return ErrStoreForeign
	}
	return ErrStoreBehind
}

// past is what is recorded of the store when it is accepted.
func (e *BehindError) past() string {
	if e.Foreign != "" {
		return fmt.Sprintf("the database had belonged to the ledger %s", e.Foreign)
	}
	if e.copied != "" {
		return fmt.Sprintf("all of the data folder had been restored from the copy %q: what the ledger had recorded since is lost", e.copied)
	}
	return fmt.Sprintf("the database had been restored from a copy of revision %d; the ledger was at %d", e.Revision, e.WantRevision)
}

// Acceptance is by whom a store is accepted that OpenAnchor refuses, and what its
// record says besides.
type Acceptance struct {
	By                             string
	Now                            time.Time
	TrustDomain, Instance, Version string
	// Restored names the copy from which all of the data folder was restored, "" if only
	// the store was. Nothing in the folder can tell that: agents can, and do not follow.
	Restored string
}

// ErrAccepted says that the data folder was accepted as restored from this copy before.
var ErrAccepted = errors.New("it was accepted before")

// lostRevisions is more than a ledger that is lost can have had since a copy was made:
// what agents were told then has smaller numbers.
const lostRevisions = 1 << 20

// AcceptStore makes the store that OpenAnchor refuses the one that counts, by the
// word of an operator, which is recorded first: its rows are what was recorded. What
// was banned, evicted or quarantined since stays so, and join tokens that were used or
// withdrawn since are removed. restore must have the store belong to this ledger, make its
// revision and trust bundle sequence at least these, and begin a new epoch, so that
// agents take what it says for new.
//
// A data folder that was restored as a whole is accepted by its copy's name, once: the
// error is ErrAccepted for the same name.
func AcceptStore(ctx context.Context, path string, journal *ledger.Journal, st TrustStore, who Acceptance,
	restore func(revision, sequence uint64) (epoch string, err error),
) error {
	a, err := openAnchor(ctx, path, journal, st, who.Version)
	behind, ok := errors.AsType[*BehindError](err)
	switch {
	case who.Restored != "" && a.restored == who.Restored:
		return fmt.Errorf("the copy %q: %w", who.Restored, ErrAccepted)
	case err != nil && !ok:
		return err
	case err == nil && who.Restored == "":
		return errors.New("the store is this ledger's, and not behind it: there is nothing to accept. If all of the data folder was restored from a copy, name the copy with --restored")
	}
	entries, revision, err := st.Entries(ctx)
	if err != nil {
		return err
	}
	trust, err := st.Trust(ctx)
	if err != nil {
		return err
	}
	nodes, err := st.Nodes(ctx)
	if err != nil {
		return err
	}
	quarantines, err := st.Quarantines(ctx)
	if err != nil {
		return err
	}
	tokens, err := st.Tokens(ctx, who.Now)
	if err != nil {
		return err
	}
	if behind == nil {
		behind = &BehindError{Revision: revision, WantRevision: revision, Sequence: trust.Sequence, WantSequence: trust.Sequence}
	}
	behind.copied = who.Restored
	if _, err := journal.Append(ctx, ledger.NewDraft(&ledgerv1.Record{
		Version: recordVersion, Time: timestamppb.New(who.Now), Event: ledgerv1.Event_EVENT_STORE_ACCEPTED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: who.TrustDomain, CaInstance: who.Instance, CaVersion: who.Version, Actor: who.By,
		Detail: behind.past(),
		Store: &ledgerv1.StoreAccepted{
			Revision: behind.Revision, BundleSequence: behind.Sequence, LedgerRevision: behind.WantRevision, LedgerBundleSequence: behind.WantSequence,
			Lost: behind.Changes[:min(len(behind.Changes), maxShown)],
		},
	}, nil)); err != nil {
		return err
	}
	revision, sequence := max(behind.WantRevision, revision)+1, max(behind.WantSequence, trust.Sequence)+1
	if who.Restored != "" {
		revision, sequence = revision+lostRevisions, sequence+lostRevisions
	}
	open, used, withdrawn := a.wanted.knownTokens().judge(tokens)
	for _, t := range slices.Concat(used, withdrawn) {
		if err := st.DeleteToken(ctx, t.SHA256, recordNothing); err != nil {
			return err
		}
	}
	epoch, err := restore(revision, sequence)
	if err != nil {
		return err
	}
	next := &anchored{
		Epoch: epoch, Revision: revision, Sequence: sequence, Records: journal.Size(), Entries: map[string]string{},
		Roots: rootHashes(trust.Bundle()), anchoredNodes: a.wanted.accept(nodes, quarantines), Restored: who.Restored,
	}
	next.NodeRecords, next.Version, next.Tokens = next.Records, who.Version, open
	for _, e := range entries {
		next.Entries[e.GetName()] = digestText(identity.DigestOf(e))
	}
	return next.write(path)
}

func rootHashes(bundle [][]byte) []string {
	all := make([]string, 0, len(bundle))
	for _, der := range bundle {
		sum := sha256.Sum256(der)
		all = append(all, hex.EncodeToString(sum[:]))
	}
	slices.Sort(all)
	return all
}

func (k *anchored) write(path string) error {
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, b, 0o600)
}

// keepAnchor notes what is in force, if there is an anchor.
func (s *Server) keepAnchor(ctx context.Context) {
	a := s.cfg.Anchor
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	records := a.journal.Size() // what comes later is looked at again
	entries, bundle := s.registry.Entries(), s.bundle()
	next := &anchored{
		Epoch: s.cfg.Store.Epoch(), Revision: entries.Revision, Sequence: bundle.GetSequence(), Records: records,
		Roots:    rootHashes(bundle.GetRoots()),
		Restored: a.restored,
		Entries:  make(map[string]string, entries.Set.Len()+len(entries.Broken)),
	}
	for e := range entries.Set.All() {
		next.Entries[e.Name()] = digestText(e.Digest())
	}
	for name, e := range entries.Broken {
		if _, not := a.unrecorded[name]; !not {
			next.Entries[name] = digestText(identity.DigestOf(e))
		}
	}
	maps.Copy(next.Entries, a.missing) // until they are applied again
	if a.kept != nil {
		next.anchoredNodes = a.kept.anchoredNodes
	}
	s.writeAnchor(ctx, next)
}

// writeAnchor writes the file. The anchor's mu is held.
func (s *Server) writeAnchor(ctx context.Context, next *anchored) {
	s.cfg.Anchor.kept = next
	if err := next.write(s.cfg.Anchor.path); err != nil {
		s.log.ErrorContext(ctx, "what is in force cannot be noted beside the ledger", "err", err)
	}
}
