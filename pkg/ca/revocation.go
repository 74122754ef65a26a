package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Revocation by lists, if Config.Revocation is set. Whoever goes by lists refuses all
// that an issuer without one has signed, and all that one has signed whose list has
// expired. So:
//
//   - an intermediate has a list before it signs for workloads, and signs for them once
//     every live proxy has acknowledged the bundle with that list (prepare, promote)
//   - its list is good for longer than anything that it signs: no outage, however long,
//     has it expire
//   - it stays in the bundle until nothing lives that the intermediate signed, also when
//     its key is gone since the CA was restarted (tend)
//   - what is revoked leaves the list only when it has expired (prune)
//   - lists are part of the bundle only if each intermediate of which something lives has
//     one, and all of them are good; else the bundle stays as it was (checkLists)
//
// The lists are in the store beside the roots, and change in the same transactions.

const (
	// listMargin is how much longer than its issuer a list is good, and for how long
	// at least: longer than anything lives, so that nothing that lives is ever
	// refused since nobody could be asked for a newer list.
	listMargin = 48 * time.Hour
	// pruneMargin is how long a certificate has expired before it leaves a list, for
	// those whose clocks are behind.
	pruneMargin = time.Hour
	// restartWait is how long nothing is signed for workloads, if there is no older
	// intermediate to go on with, until the nodes have the list of a new one. Agents
	// connect again within half of it.
	restartWait = time.Minute
	// maxRevoked bounds one list: half a megabyte for each proxy.
	maxRevoked = 10_000
	// maxLists bounds how many there are.
	maxLists = 1000
	// maxIssued bounds what is remembered of what one intermediate signed: some
	// 300 MB.
	maxIssued = 1 << 20
	// recordsAtOnce is how many revocations are appended to the ledger at once.
	recordsAtOnce = 256
)

// ErrListsBelow is returned where a CA below this one asks for an intermediate.
var ErrListsBelow = errors.New("this CA revokes by lists, and those of a CA below it would be missing: no intermediates are signed for others")

// Leaf is what is known of a certificate that lives.
type Leaf struct {
	Serial    [16]byte
	SPIFFEID  string
	KeySHA256 [32]byte
	// Node and Entry are the SPIFFE ID of the node and the name of the entry that it
	// was issued for; "" where there is none.
	Node, Entry string
	// Requested is when its request came, in Unix nanoseconds; NotAfter is in Unix
	// seconds.
	Requested, NotAfter int64
}

// Revoked is what Revoke did.
type Revoked struct {
	// Count is how many certificates were put on lists now.
	Count int
	// Sequence is that of the first bundle with all of them; 0 if there are none, or if
	// nobody goes by lists yet.
	Sequence uint64
	// Left says why certificates may be missing from the lists; "" if none are.
	Left string
}

// pending is an intermediate that signs once its list is in force everywhere.
type pending struct {
	*authority
	since time.Time
	// sequence is that of the first bundle with its list.
	sequence uint64
}

// listing is what an intermediate knows of what it signed.
type listing struct {
	mu     sync.Mutex // guards what follows
	leaves map[[16]byte]Leaf
	sweep  int // the size at which those that have expired are dropped
	lost   int // how many were not remembered

	// revoked and number are those of its list. The CA's mu guards them.
	revoked []revokedLeaf
	number  *big.Int
}

type revokedLeaf struct {
	serial   [16]byte
	at       time.Time
	notAfter int64
}

func newListing() *listing {
	return &listing{leaves: make(map[[16]byte]Leaf), sweep: 1024, number: new(big.Int)}
}

// signed remembers a certificate.
func (l *listing) signed(leaf Leaf, now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.leaves) >= l.sweep {
		for serial, old := range l.leaves {
			if old.NotAfter < now {
				delete(l.leaves, serial)
			}
		}
		l.sweep = max(2*len(l.leaves), 1024)
	}
	if len(l.leaves) >= maxIssued {
		l.lost++
		return
	}
	l.leaves[leaf.Serial] = leaf
}

// find returns those that live and are not revoked yet.
func (l *listing) find(now int64, match func(*Leaf) bool) (found []Leaf, lost int) {
	known := make(map[[16]byte]bool, len(l.revoked))
	for _, r := range l.revoked {
		known[r.serial] = true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for serial, leaf := range l.leaves {
		if leaf.NotAfter >= now && !known[serial] && match(&leaf) {
			found = append(found, leaf)
		}
	}
	return found, l.lost
}

// prune returns what of a list has not expired for long; a pure function.
func prune(revoked []revokedLeaf, now time.Time) []revokedLeaf {
	return slices.DeleteFunc(slices.Clone(revoked), func(r revokedLeaf) bool {
		return now.Unix() > r.notAfter+int64(pruneMargin/time.Second)
	})
}

// signList has an intermediate sign its list.
func (c *CA) signList(a *authority, now time.Time, number *big.Int, revoked []revokedLeaf) (RevocationList, error) {
	t := &x509.RevocationList{
		Number: number,
		// A verifier whose clock is behind accepts it as it does leaves.
		ThisUpdate: later(floor(now.Add(-2*c.cfg.Backdate)), a.notBefore),
		NextUpdate: a.cert.NotAfter.Add(listMargin),
	}
	for _, r := range revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: new(big.Int).SetBytes(r.serial[:]), RevocationTime: r.at})
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, a.cert, a.key)
	if err != nil {
		return RevocationList{}, fmt.Errorf("sign the revocation list of intermediate %s: %w", a.id, err)
	}
	return RevocationList{Issuer: a.cert.Raw, List: der}, nil
}

// checkLists says why lists may not become part of a bundle: who goes by them would
// refuse somebody who lives, for want of a good list.
func checkLists(lists []RevocationList, alive []Intermediate, now time.Time) error {
	if len(lists) > maxLists {
		return fmt.Errorf("there are %d revocation lists: at most %d can be", len(lists), maxLists)
	}
	have := make(map[string]bool, len(lists))
	for _, l := range lists {
		issuer, err := x509.ParseCertificate(l.Issuer)
		if err != nil {
			return fmt.Errorf("read the issuer of a revocation list: %w", err)
		}
		id := authorityID(issuer)
		list, err := x509.ParseRevocationList(l.List)
		if err != nil {
			return fmt.Errorf("read the revocation list of intermediate %s: %w", id, err)
		}
		switch err := list.CheckSignatureFrom(issuer); {
		case err != nil:
			return fmt.Errorf("check the revocation list of intermediate %s: %w", id, err)
		case !bytes.Equal(list.RawIssuer, issuer.RawSubject):
			return fmt.Errorf("the revocation list of intermediate %s names another issuer", id)
		case list.ThisUpdate.After(now):
			return fmt.Errorf("the revocation list of intermediate %s is good from %s on only", id, list.ThisUpdate.UTC().Format(time.RFC3339))
		case list.NextUpdate.Before(issuer.NotAfter) || list.NextUpdate.Before(now.Add(listMargin/2)):
			return fmt.Errorf("the revocation list of intermediate %s ends at %s, too soon: an outage would have everybody refused", id, list.NextUpdate.UTC().Format(time.RFC3339))
		case have[id]:
			return fmt.Errorf("intermediate %s has two revocation lists", id)
		}
		have[id] = true
	}
	for _, i := range alive {
		if !have[i.ID] && i.LiveUntil.After(now) {
			return fmt.Errorf("what intermediate %s signed may live until %s, and it has no revocation list", i.ID, i.LiveUntil.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// listsChange is a change of the lists.
type listsChange struct {
	// put are lists that are new or newer.
	put []RevocationList
	// records are those of what was revoked.
	records []*ledgerv1.Record
	why     string
	actor   string
	// committed, if set, is called when it is stored.
	committed func()
}

// changeLists stores a change of the lists, if there is any, and puts it into force. The
// lists of intermediates of which nothing lives are dropped. The caller holds mu.
func (c *CA) changeLists(ctx context.Context, now time.Time, ch listsChange) (changed bool, err error) {
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	alive, err := c.cfg.Store.Intermediates(sctx)
	if err != nil {
		return false, fmt.Errorf("read the intermediates: %w", err)
	}
	s := c.state.Load()
	t := s.trust
	t.Lists = s.wantedLists(ch.put, alive, now)
	same := slices.EqualFunc(s.trust.Lists, t.Lists, func(a, b RevocationList) bool { return bytes.Equal(a.List, b.List) })
	if same && t.Listed {
		return false, nil
	}
	problem := checkLists(t.Lists, alive, now)
	switch {
	case problem == nil:
		t.Listed = true
	case t.Listed:
		// What is in force stays: it is good, or was when it was put into force.
		return false, fmt.Errorf("the revocation lists in force stay: %w", problem)
	}
	c.noteUnlisted(problem)
	if same && !t.Listed {
		return false, nil
	}
	stored, err := c.cfg.Store.ChangeTrust(sctx, t, func(stored Trust) error {
		for some := range slices.Chunk(ch.records, recordsAtOnce) {
			var drafts []*ledger.Draft
			for _, r := range some {
				drafts = append(drafts, ledger.NewDraft(r, nil))
			}
			if _, err := c.cfg.Ledger.Append(sctx, drafts...); err != nil {
				return fmt.Errorf("record what is revoked: %w", err)
			}
		}
		return c.recordStep(sctx, now, s.trust, stored, &rotation.Step{Why: ch.why}, ch.actor)
	})
	if err != nil {
		return false, fmt.Errorf("store revocation lists: %w", err)
	}
	if ch.committed != nil {
		ch.committed()
	}
	if err := c.adopt(ctx, now, stored, nil); err != nil {
		return true, err
	}
	c.log.InfoContext(ctx, "revocation lists changed", "count", len(t.Lists), "in_force", t.Listed, "sequence", stored.Sequence, "reason", ch.why)
	return true, nil
}

// wantedLists returns the lists with those that are put, without those of intermediates
// of which nothing lives; in the order of their issuers.
func (s *state) wantedLists(put []RevocationList, alive []Intermediate, now time.Time) []RevocationList {
	wanted := make(map[string]bool)
	for _, i := range alive {
		wanted[i.ID] = i.LiveUntil.After(now)
	}
	for _, a := range s.own() {
		wanted[a.id] = true
	}
	lists := slices.Clone(put)
	for _, l := range s.trust.Lists {
		issuer, err := x509.ParseCertificate(l.Issuer)
		if err == nil && !wanted[authorityID(issuer)] {
			continue
		}
		if !slices.ContainsFunc(put, func(p RevocationList) bool { return bytes.Equal(p.Issuer, l.Issuer) }) {
			lists = append(lists, l)
		}
	}
	slices.SortFunc(lists, func(a, b RevocationList) int { return bytes.Compare(a.Issuer, b.Issuer) })
	return lists
}

// own returns the intermediates whose keys this process has.
func (s *state) own() []*authority {
	var all []*authority
	if s.next != nil {
		all = append(all, s.next.authority)
	}
	if s.active != nil {
		all = append(all, s.active)
	}
	for _, r := range s.retiring {
		all = append(all, r.authority)
	}
	return all
}

// noteUnlisted says in Health why lists are not in force; nil for nothing.
func (c *CA) noteUnlisted(problem error) {
	text := ""
	if problem != nil {
		text = "nothing is revoked by lists yet, certificates live on until they expire: " + problem.Error()
	}
	c.unlisted.Store(&text)
}

// dropLists ends revocation by lists, if an earlier process of the CA began it. The
// caller holds mu, or nobody else has this CA yet.
func (c *CA) dropLists(ctx context.Context, now time.Time) error {
	s := c.state.Load()
	if !s.trust.Listed && len(s.trust.Lists) == 0 {
		return nil
	}
	t := s.trust
	t.Listed, t.Lists = false, nil
	stored, err := c.cfg.Store.ChangeTrust(ctx, t, func(stored Trust) error {
		return c.recordStep(ctx, now, s.trust, stored, &rotation.Step{Why: "revocation lists are switched off"}, "")
	})
	if err != nil {
		return fmt.Errorf("drop the revocation lists: %w", err)
	}
	c.log.WarnContext(ctx, "revocation lists are switched off: what is on them is believed again", "count", len(s.trust.Lists))
	return c.adopt(ctx, now, stored, nil)
}

// resumeLists begins where an earlier process of the CA has left off: if it did not
// revoke by lists, and so something lives whose issuer has none, nobody is to go by them
// until that has ended. The caller has this CA for itself.
func (c *CA) resumeLists(ctx context.Context, now time.Time) error {
	s := c.state.Load()
	if !s.trust.Listed {
		return nil
	}
	alive, err := c.cfg.Store.Intermediates(ctx)
	if err != nil {
		return err
	}
	problem := checkLists(s.wantedLists(nil, alive, now), alive, now)
	if problem == nil {
		return nil
	}
	t := s.trust
	t.Listed = false
	stored, err := c.cfg.Store.ChangeTrust(ctx, t, func(stored Trust) error {
		return c.recordStep(ctx, now, s.trust, stored, &rotation.Step{Why: "revocation lists are not in force: " + problem.Error()}, "")
	})
	if err != nil {
		return fmt.Errorf("take the revocation lists out of the bundle: %w", err)
	}
	c.log.ErrorContext(ctx, "revocation lists are not in force until they are complete", "err", problem)
	return c.adopt(ctx, now, stored, nil)
}

// prepare gives a new intermediate its list, and has it sign at once if nobody goes by
// lists yet, else when that list is in force everywhere. The caller holds mu.
func (c *CA) prepare(ctx context.Context, a *authority, now time.Time) error {
	a.listing = newListing()
	list, err := c.signList(a, now, new(big.Int).SetInt64(now.UnixNano()), nil)
	if err != nil {
		return err
	}
	a.listing.number.SetInt64(now.UnixNano())
	waits := c.state.Load().trust.Listed
	if _, err := c.changeLists(ctx, now, listsChange{put: []RevocationList{list}, why: "intermediate " + a.id + " is to sign"}); err != nil {
		return err
	}
	if !waits {
		return c.install(ctx, a, now)
	}
	s := c.state.Load()
	// It may sign for agents from now on.
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := c.cfg.Store.PutIntermediates(sctx, now, Intermediate{ID: a.id, Root: a.root.id, Instance: c.cfg.Instance, LiveUntil: a.notAfter}); err != nil {
		return err
	}
	if _, err := c.cfg.Ledger.Append(ctx, c.intermediateDraft(now, a, StatePrepared, s.trust.Sequence)); err != nil {
		return fmt.Errorf("record it: %w", err)
	}
	next := *s
	if old := s.next; old != nil { // the root has changed meanwhile, or its key is bad
		if err := c.cfg.Store.PutIntermediates(sctx, now, Intermediate{ID: old.id, Root: old.root.id, Instance: c.cfg.Instance, LiveUntil: c.lastLeafEnd(now)}); err != nil {
			return err
		}
		next.retiring = append([]retiring{{authority: old.authority, since: now.Round(0)}}, s.retiring...)
	}
	next.next = &pending{authority: a, since: now.Round(0), sequence: s.trust.Sequence}
	c.setState(&next)
	c.log.InfoContext(ctx, "intermediate prepared: it signs when its revocation list is in force everywhere", "authority", a.id, "sequence", s.trust.Sequence)
	return nil
}

// latest is when a pending intermediate signs, whoever does not have its list yet: not
// before there is need.
func (c *CA) latest(s *state, now time.Time) time.Time {
	soon := s.next.since.Add(restartWait)
	a := s.active
	if a == nil || !a.usable(now) || a.suspect.Load() || a.root.tainted || slices.ContainsFunc(s.roots, func(r *root) bool { return r.id == a.root.id && r.tainted }) {
		return soon
	}
	return later(soon, a.leafEnd.Add(-c.cfg.MaxTTL))
}

// promote has the pending intermediate sign, if its list is in force at all live
// proxies, or they cannot be waited for any longer. The caller holds mu.
func (c *CA) promote(ctx context.Context, now time.Time) (changed bool, err error) {
	s := c.state.Load()
	if s.next == nil {
		return false, nil
	}
	in, err := c.inputs(ctx, now, s)
	if err != nil {
		return false, err
	}
	waiting := rotation.Waiting(in, s.next.sequence)
	if latest := c.latest(s, now); len(waiting) > 0 && now.Before(latest) {
		text := ""
		if s.active == nil || now.Sub(s.next.since) > stalledAfter {
			text = fmt.Sprintf("intermediate %s signs for workloads when its revocation list is in force everywhere, at %s at the latest: waiting for %s",
				s.next.id, latest.UTC().Format(time.RFC3339), rotation.Names(waiting))
		}
		c.unlisted.Store(&text)
		return false, nil
	}
	if len(waiting) > 0 {
		c.log.WarnContext(ctx, "intermediate signs though its revocation list is not in force everywhere: who does not have it refuses what is new until then",
			"authority", s.next.id, "waiting_for", rotation.Names(waiting))
	}
	if err := c.install(ctx, s.next.authority, now); err != nil {
		return false, err
	}
	c.unlisted.Store(new(""))
	return true, nil
}

// tend drops the lists of which nothing lives, and puts lists into force once all who
// live have one. The caller holds mu.
func (c *CA) tend(ctx context.Context, now time.Time) (changed bool, err error) {
	if !c.cfg.Revocation {
		return false, nil
	}
	if s := c.state.Load(); s.next != nil {
		return false, nil // its own list is on the way
	}
	return c.changeLists(ctx, now, listsChange{why: "intermediates have ended"})
}

// Revoke puts those certificates that live and match on the lists of their issuers, as
// far as this process has signed them; Left says what it may have missed. match is
// called with locks held. Without Config.Revocation it does nothing. What it did is
// stored and recorded when it returns, and OnChange was called.
func (c *CA) Revoke(ctx context.Context, why, actor string, match func(*Leaf) bool) (Revoked, error) {
	if !c.cfg.Revocation {
		return Revoked{}, nil
	}
	r, err := c.revokeLocked(ctx, why, actor, match)
	if r.Count > 0 {
		c.cfg.OnChange()
	}
	return r, err
}

func (c *CA) revokeLocked(ctx context.Context, why, actor string, match func(*Leaf) bool) (r Revoked, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.cfg.Clock(); err != nil {
		// A list from the future would have everybody refused.
		return r, fmt.Errorf("sign revocation lists: %w", err)
	}
	for range maxSteps { // another CA may be quicker
		now := time.Now().Round(0)
		if _, err := c.refresh(ctx, now); err != nil {
			return r, err
		}
		if r, err = c.revoke(ctx, now, why, actor, match); !errors.Is(err, ErrTrustChanged) {
			return r, err
		}
	}
	return r, err
}

func (c *CA) revoke(ctx context.Context, now time.Time, why, actor string, match func(*Leaf) bool) (Revoked, error) {
	var left []string
	s := c.state.Load()
	ch := listsChange{why: why, actor: actor}
	count := 0
	var commits []func()
	for _, a := range s.own() {
		found, lost := a.listing.find(now.Unix(), match)
		if lost > 0 {
			left = append(left, fmt.Sprintf("intermediate %s has signed more than can be remembered", a.id))
		}
		if len(found) == 0 {
			continue
		}
		revoked := prune(a.listing.revoked, now)
		if room := maxRevoked - len(revoked); len(found) > room {
			left = append(left, fmt.Sprintf("the list of intermediate %s is full: %d of %d certificates are not on it", a.id, len(found)-room, len(found)))
			found = found[:room]
		}
		for _, leaf := range found {
			revoked = append(revoked, revokedLeaf{serial: leaf.Serial, at: floor(now), notAfter: leaf.NotAfter})
			ch.records = append(ch.records, c.revokedRecord(now, a, leaf, why, actor))
		}
		number := new(big.Int).SetInt64(now.UnixNano())
		if number.Cmp(a.listing.number) <= 0 {
			number.Add(a.listing.number, big.NewInt(1))
		}
		list, err := c.signList(a, now, number, revoked)
		if err != nil {
			return Revoked{}, err
		}
		ch.put = append(ch.put, list)
		count += len(found)
		commits = append(commits, func() { a.listing.revoked, a.listing.number = revoked, number })
	}
	ch.committed = func() {
		for _, commit := range commits {
			commit()
		}
	}
	if count > 0 {
		if _, err := c.changeLists(ctx, now, ch); err != nil {
			return Revoked{}, err
		}
		c.metrics.revoked.Add(float64(count))
	}
	s = c.state.Load()
	r := Revoked{Count: count}
	if s.trust.Listed && count > 0 {
		r.Sequence = s.trust.Sequence
	}
	if text := c.unlisted.Load(); !s.trust.Listed && text != nil {
		left = append(left, *text)
	}
	r.Left = strings.Join(left, "; ")
	return r, nil
}

func (c *CA) revokedRecord(now time.Time, a *authority, leaf Leaf, why, actor string) *ledgerv1.Record {
	r := &ledgerv1.Record{
		Version: recordVersion, Time: timestamppb.New(now),
		Event: ledgerv1.Event_EVENT_REVOKED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: c.cfg.TrustDomain.Name(), SpiffeId: leaf.SPIFFEID, Actor: actor, Detail: why,
		Certificate: &ledgerv1.Certificate{Serial: leaf.Serial[:], SpkiSha256: leaf.KeySHA256[:], NotAfter: timestamppb.New(time.Unix(leaf.NotAfter, 0))},
		Authority:   a.record,
		CaInstance:  c.cfg.Instance, CaVersion: c.cfg.Version,
	}
	if leaf.Node != "" {
		r.Node = &ledgerv1.NodeRef{Id: leaf.Node}
	}
	if leaf.Entry != "" {
		r.Entry = &ledgerv1.EntryRef{Name: leaf.Entry}
	}
	return r
}

// Bequeathed is an intermediate whose list stays as it is, since its key is gone with
// an earlier process of the CA.
type Bequeathed struct {
	ID string
	// LiveUntil is when nothing lives any more that it signed.
	LiveUntil time.Time
	// Revoked are the serial numbers on its list.
	Revoked map[[16]byte]bool
}

// Bequeathed returns the intermediates of earlier processes of which something may live.
func (c *CA) Bequeathed(ctx context.Context) ([]Bequeathed, error) {
	s := c.state.Load()
	if !c.cfg.Revocation || !s.trust.Listed {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	alive, err := c.cfg.Store.Intermediates(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the intermediates: %w", err)
	}
	own := s.own()
	var all []Bequeathed
	for _, l := range s.trust.Lists {
		issuer, err := x509.ParseCertificate(l.Issuer)
		if err != nil {
			return nil, fmt.Errorf("read the issuer of a revocation list: %w", err)
		}
		list, err := x509.ParseRevocationList(l.List)
		if err != nil {
			return nil, fmt.Errorf("read a revocation list: %w", err)
		}
		b := Bequeathed{ID: authorityID(issuer), Revoked: make(map[[16]byte]bool)}
		i := slices.IndexFunc(alive, func(i Intermediate) bool { return i.ID == b.ID })
		if i < 0 || slices.ContainsFunc(own, func(a *authority) bool { return a.id == b.ID }) {
			continue
		}
		b.LiveUntil = alive[i].LiveUntil
		for _, r := range list.RevokedCertificateEntries {
			if serial := r.SerialNumber; serial.BitLen() <= 128 {
				b.Revoked[[16]byte(serial.FillBytes(make([]byte, 16)))] = true
			}
		}
		all = append(all, b)
	}
	return all, nil
}

// Abandon drops the list of an intermediate of an earlier process, and so has all that
// it signed refused by whoever goes by lists. It returns the sequence of the first bundle
// without it. It is for when everybody who is to go on has a certificate of another one.
func (c *CA) Abandon(ctx context.Context, id, why, actor string) (sequence uint64, err error) {
	sequence, err = c.abandon(ctx, id, why, actor)
	if err == nil {
		c.cfg.OnChange()
	}
	return sequence, err
}

func (c *CA) abandon(ctx context.Context, id, why, actor string) (sequence uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range maxSteps { // another CA may be quicker
		now := time.Now().Round(0)
		if _, err := c.refresh(ctx, now); err != nil {
			return 0, err
		}
		s := c.state.Load()
		if slices.ContainsFunc(s.own(), func(a *authority) bool { return a.id == id }) {
			return 0, fmt.Errorf("intermediate %s is one of this process: what it signed is revoked by its list", id)
		}
		sctx, cancel := context.WithTimeout(ctx, storeTimeout)
		err = c.cfg.Store.PutIntermediates(sctx, now, Intermediate{ID: id, Instance: c.cfg.Instance, LiveUntil: now.Add(-time.Second)})
		cancel()
		if err != nil {
			return 0, err
		}
		if _, err = c.changeLists(ctx, now, listsChange{why: why, actor: actor}); !errors.Is(err, ErrTrustChanged) {
			return c.state.Load().trust.Sequence, err
		}
	}
	return 0, err
}

// Signs says whether there is an intermediate that signs for workloads.
func (c *CA) Signs(now time.Time) bool {
	a := c.state.Load().active
	return a != nil && a.usable(now)
}

// RevokesByLists says whether Config.Revocation is set.
func (c *CA) RevokesByLists() bool { return c.cfg.Revocation }
