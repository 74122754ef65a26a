package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// Finder finds records of the ledger. An error that wraps the context's is that of
// the deadline.
type Finder interface {
	Find(ctx context.Context, q search.Query) ([]search.Found, search.Position, error)
	// EntryChanges returns the records of an entry's changes, the oldest first.
	EntryChanges(ctx context.Context, entry string) ([]search.Found, error)
}

// Inventory finds the records of X.509-SVIDs.
type Inventory interface {
	Who(ctx context.Context, q search.Holders) ([]search.Found, search.Position, error)
	FirstSeen(ctx context.Context, since time.Time, node string, limit int, after search.Position) ([]search.Found, search.Position, error)
	Overdue(ctx context.Context, now, expired time.Time, limit int, after search.Position) ([]search.Found, search.Position, error)
}

// RecordNames finds names in records.
type RecordNames interface {
	Names(ctx context.Context, kind, prefix string, limit int) ([]string, error)
	// NodesNamed returns the nodes whose SPIFFE ID ends with "/"+name.
	NodesNamed(ctx context.Context, name string) ([]string, error)
}

// Records is the ledger's search index; *store.Records has it.
type Records interface {
	Finder
	Inventory
	RecordNames
	// CatchUp waits until every record that is durable in the ledger now can be
	// found, or until ctx ends, and returns how many of them cannot.
	CatchUp(ctx context.Context) (behind uint64)
	// Before returns the number of records at the beginning of the ledger that are
	// all older than t.
	Before(ctx context.Context, t time.Time) (uint64, error)
	// Forget removes the records below limit, which were archived.
	Forget(ctx context.Context, limit uint64) error
}

// Sinks knows what the ledger's sinks have taken; *ledger.FeedMetrics does.
type Sinks interface {
	// Taken is the number of records that every sink has, and the sink that is
	// furthest behind.
	Taken() (records uint64, sink string)
}

// Limits of questions.
const (
	defaultPage   = 100
	maxPage       = 10_000
	maxPart       = 512 << 10 // bytes of records in one message
	maxFilter     = 2048      // bytes of one filter
	maxCompletion = 100
	maxJudged     = 20_000 // issuances for one part of NewlyAllowed
	maxVerdicts   = 10_000 // that are remembered meanwhile
	findTimeout   = 30 * time.Second
	catchUpTime   = time.Second // that a question waits for the newest records

	// leastArchiveAge is that of records that may be archived: younger ones may be
	// of certificates that are still valid.
	leastArchiveAge = 48 * time.Hour
	archiveTimeout  = 6 * time.Hour

	// requestSlack is how long before a change of entries a request may have come
	// that was judged after it, and the other way round.
	requestSlack = time.Minute
)

// LedgerService returns the service for questions about the ledger. It relies on
// the interceptors of GRPC or AdminGRPC having named the caller.
func (s *Server) LedgerService() adminv1.LedgerServiceServer { return &ledgerService{s: s} }

type ledgerService struct {
	adminv1.UnimplementedLedgerServiceServer
	s *Server
}

// records returns the search index, if there is one.
func (l *ledgerService) records() (Records, error) {
	if l.s.cfg.Records == nil {
		return nil, fail(kindConflict, "this CA has no search index of its ledger", nil)
	}
	return l.s.cfg.Records, nil
}

// begin is how every question begins: with the search index, which knows all that
// was decided before the question came, and the page of the answer that is wanted.
// An index that does not catch up soon answers all the same, and the trailer says
// what the answer lacks.
func (l *ledgerService) begin(stream grpc.ServerStream, wanted *adminv1.Page) (Records, *page, error) {
	r, err := l.records()
	if err != nil {
		return nil, nil, err
	}
	p, err := newPage(wanted)
	if err != nil || p.next.Valid { // the page before has waited
		return r, p, err
	}
	ctx, cancel := context.WithTimeout(stream.Context(), catchUpTime)
	defer cancel()
	if behind := r.CatchUp(ctx); behind > 0 {
		stream.SetTrailer(metadata.Pairs(search.BehindTrailer, strconv.FormatUint(behind, 10)))
	}
	return r, p, nil
}

// failFind says why a question has no answer.
func failFind(err error) error {
	switch {
	case err == nil:
		return nil
	case isFailure(err):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return fail(kindUnavailable, "it took too long: narrow the search by time, or by another filter", err)
	case errors.Is(err, context.Canceled):
		return err
	default:
		return fail(kindUnavailable, "the ledger cannot be searched now: the CA's log says why", err)
	}
}

// page is a list on its way to a caller.
type page struct {
	limit int
	next  search.Position
}

func newPage(p *adminv1.Page) (*page, error) {
	out := &page{limit: int(p.GetLimit())}
	if out.limit == 0 {
		out.limit = defaultPage
	}
	if out.limit > maxPage {
		return nil, fail(kindInvalid, fmt.Sprintf("page.limit is %d, at most %d are allowed", out.limit, maxPage), nil)
	}
	if t := p.GetToken(); t != "" {
		if n, err := fmt.Sscanf(t, "%d.%d", &out.next.Key, &out.next.Record); n != 2 || err != nil || token(out.next) != t {
			return nil, fail(kindInvalid, "page.token is not one that was given out", nil)
		}
		out.next.Valid = true
	}
	return out, nil
}

func token(p search.Position) string { return fmt.Sprintf("%d.%d", p.Key, p.Record) }

// list gives send the records that find finds, in parts, up to the page's limit.
// The last part has the token with which the list goes on, if it does.
func (p *page) list(find func(limit int, after search.Position) ([]search.Found, search.Position, error),
	send func(part []search.Found, token string) error,
) error {
	for left := p.limit; ; {
		found, next, err := find(min(left, search.MaxFound), p.next)
		if err != nil {
			return failFind(err)
		}
		left -= len(found)
		p.next = next
		end := !next.Valid || left <= 0
		for {
			n, bytes := 0, 0
			for n < len(found) && bytes < maxPart {
				bytes += len(found[n].Raw)
				n++
			}
			part := found[:n]
			found = found[n:]
			t := ""
			if end && len(found) == 0 && next.Valid {
				t = token(next)
			}
			if err := send(part, t); err != nil {
				return err
			}
			if len(found) == 0 {
				break
			}
		}
		if end {
			return nil
		}
	}
}

// ledgerRecord is a record that was found, for a caller.
func ledgerRecord(f search.Found) *adminv1.LedgerRecord {
	return &adminv1.LedgerRecord{Index: f.Index, Hash: f.Hash[:], Link: f.Link[:], Record: f.Record, Anomalies: f.Anomalies}
}

// node returns the SPIFFE ID of a node that is named by it, or by its last part.
func (l *ledgerService) node(ctx context.Context, r Records, name string) (string, error) {
	if name == "" || strings.HasPrefix(name, "spiffe://") {
		return name, nil
	}
	found, err := r.NodesNamed(ctx, name)
	if err != nil {
		return "", failFind(err)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fail(kindNotFound, fmt.Sprintf("no record names a node %q", truncate(name)), nil)
	default:
		return "", fail(kindInvalid, fmt.Sprintf("%q names several nodes: write the SPIFFE ID, such as %s", truncate(name), found[0]), nil)
	}
}

// checkID says whether a filter can be the SPIFFE ID of a record.
func (l *ledgerService) checkID(filter string) error {
	if filter == "" {
		return nil
	}
	if err := checkFilters(filter); err != nil {
		return err
	}
	td := l.s.cfg.TrustDomain
	id, err := spiffeid.FromString(filter)
	switch {
	case err != nil:
		return fail(kindInvalid, fmt.Sprintf("%q is no SPIFFE ID (%v): write all of it, such as %s/app/web", truncate(filter), err, td.IDString()), nil)
	case !id.MemberOf(td):
		return fail(kindInvalid, fmt.Sprintf("%s is of another trust domain, and this CA is of %s", truncate(filter), td.Name()), nil)
	}
	return nil
}

// checkFilters bounds what is looked for.
func checkFilters(filters ...string) error {
	for _, f := range filters {
		if len(f) > maxFilter {
			return fail(kindInvalid, fmt.Sprintf("a filter has %d bytes, at most %d are allowed", len(f), maxFilter), nil)
		}
	}
	return nil
}

// Find implements adminv1.LedgerServiceServer.
func (l *ledgerService) Find(req *adminv1.FindRequest, stream adminv1.LedgerService_FindServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), findTimeout)
	defer cancel()
	r, p, err := l.begin(stream, req.GetPage())
	if err != nil {
		return err
	}
	if err := l.checkID(req.GetSpiffeId()); err != nil {
		return err
	}
	if err := checkFilters(req.GetNode(), req.GetEntry(), req.GetReason(), req.GetActor(), req.GetRequestId(),
		req.GetAuthority(), string(req.GetSerial()), string(req.GetCertificateSha256()), string(req.GetSpkiSha256())); err != nil {
		return err
	}
	if a := req.GetAnomaly(); a != "" {
		if _, known := search.ParseAnomaly(a); !known {
			return fail(kindInvalid, fmt.Sprintf("there is no rule %q for anomalies: write one of %s", truncate(a), strings.Join(search.Anomalies, ", ")), nil)
		}
	}
	node, err := l.node(ctx, r, req.GetNode())
	if err != nil {
		return err
	}
	authority, err := l.authority(ctx, r, req.GetAuthority())
	if err != nil {
		return err
	}
	q := search.Query{
		SPIFFEID: req.GetSpiffeId(), Node: node, Entry: req.GetEntry(), Revision: req.GetRevision(), Event: req.GetEvent(), Outcome: req.GetOutcome(),
		Reason: req.GetReason(), Actor: req.GetActor(), RequestID: req.GetRequestId(), Authority: authority,
		Serial: req.GetSerial(), SHA256: req.GetCertificateSha256(), SPKI: req.GetSpkiSha256(), Anomaly: req.GetAnomaly(),
		Since: optional(req.GetSince()), Until: optional(req.GetUntil()), Oldest: req.GetOldestFirst(),
	}
	return p.list(func(limit int, after search.Position) ([]search.Found, search.Position, error) {
		q.Limit, q.After = limit, after
		return r.Find(ctx, q)
	}, func(part []search.Found, token string) error {
		resp := &adminv1.FindResponse{NextPageToken: token}
		for _, f := range part {
			resp.Records = append(resp.Records, ledgerRecord(f))
		}
		return stream.Send(resp)
	})
}

// optional is the zero time for an absent one.
func optional(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// holders are certificates that were found, for a caller.
func holders(part []search.Found) []*adminv1.Holder {
	list := make([]*adminv1.Holder, len(part))
	for i, f := range part {
		list[i] = &adminv1.Holder{
			Issued: ledgerRecord(f), State: f.State.String(), Since: timestamppb.New(f.Since), ReplacedBy: f.ReplacedBy,
		}
	}
	return list
}

// Who implements adminv1.LedgerServiceServer.
func (l *ledgerService) Who(req *adminv1.WhoRequest, stream adminv1.LedgerService_WhoServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), findTimeout)
	defer cancel()
	r, p, err := l.begin(stream, req.GetPage())
	if err != nil {
		return err
	}
	if req.GetSpiffeId()+req.GetNode()+req.GetEntry()+req.GetAuthority()+req.GetRoot() == "" {
		return fail(kindInvalid, "say who: by a SPIFFE ID, a node, an entry, an authority or a root", nil)
	}
	if err := l.checkID(req.GetSpiffeId()); err != nil {
		return err
	}
	if err := checkFilters(req.GetNode(), req.GetEntry(), req.GetAuthority(), req.GetRoot()); err != nil {
		return err
	}
	node, err := l.node(ctx, r, req.GetNode())
	if err != nil {
		return err
	}
	q := search.Holders{
		SPIFFEID: req.GetSpiffeId(), Node: node, Entry: req.GetEntry(), At: optional(req.GetAt()), Current: req.GetCurrent(),
	}
	if q.Authorities, err = l.signers(ctx, r, req); err != nil {
		return err
	}
	if req.GetRoot() != "" && len(q.Authorities) == 0 {
		return stream.Send(new(adminv1.WhoResponse)) // nothing was ever signed below it
	}
	if q.At.IsZero() {
		q.At = time.Now()
	}
	return p.list(func(limit int, after search.Position) ([]search.Found, search.Position, error) {
		q.Limit, q.After = limit, after
		return r.Who(ctx, q)
	}, func(part []search.Found, token string) error {
		return stream.Send(&adminv1.WhoResponse{Holders: holders(part), NextPageToken: token})
	})
}

// signers are the authorities that a question is about; none if it is about all.
func (l *ledgerService) signers(ctx context.Context, r Records, req *adminv1.WhoRequest) ([]string, error) {
	authority, err := l.authority(ctx, r, req.GetAuthority())
	if err != nil {
		return nil, err
	}
	switch {
	case req.GetRoot() == "" && authority == "":
		return nil, nil
	case req.GetRoot() == "":
		return []string{authority}, nil
	}
	_, below, err := l.s.Below(ctx, req.GetRoot())
	if authority != "" {
		below = slices.DeleteFunc(below, func(id string) bool { return id != authority })
	}
	return below, err
}

// FirstSeen implements adminv1.LedgerServiceServer.
func (l *ledgerService) FirstSeen(req *adminv1.FirstSeenRequest, stream adminv1.LedgerService_FirstSeenServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), findTimeout)
	defer cancel()
	r, p, err := l.begin(stream, req.GetPage())
	if err != nil {
		return err
	}
	if req.GetSince() == nil {
		return fail(kindInvalid, "since is missing: say from when on", nil)
	}
	if err := checkFilters(req.GetNode()); err != nil {
		return err
	}
	node, err := l.node(ctx, r, req.GetNode())
	if err != nil {
		return err
	}
	return p.list(func(limit int, after search.Position) ([]search.Found, search.Position, error) {
		return r.FirstSeen(ctx, req.GetSince().AsTime(), node, limit, after)
	}, func(part []search.Found, token string) error {
		resp := &adminv1.FirstSeenResponse{NextPageToken: token}
		for _, f := range part {
			resp.Sightings = append(resp.Sightings, &adminv1.FirstSeenResponse_Sighting{Issued: ledgerRecord(f), NewIdentity: f.Fresh})
		}
		return stream.Send(resp)
	})
}

// Overdue implements adminv1.LedgerServiceServer.
func (l *ledgerService) Overdue(req *adminv1.OverdueRequest, stream adminv1.LedgerService_OverdueServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), findTimeout)
	defer cancel()
	r, p, err := l.begin(stream, req.GetPage())
	if err != nil {
		return err
	}
	now := time.Now()
	return p.list(func(limit int, after search.Position) ([]search.Found, search.Position, error) {
		return r.Overdue(ctx, now, optional(req.GetExpiredSince()), limit, after)
	}, func(part []search.Found, token string) error {
		return stream.Send(&adminv1.OverdueResponse{Holders: holders(part), NextPageToken: token})
	})
}

// ListNames implements adminv1.LedgerServiceServer.
func (l *ledgerService) ListNames(ctx context.Context, req *adminv1.ListNamesRequest) (*adminv1.ListNamesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	r, err := l.records()
	if err != nil {
		return nil, err
	}
	if err := checkFilters(req.GetPrefix()); err != nil {
		return nil, err
	}
	names, err := r.Names(ctx, req.GetKind(), req.GetPrefix(), maxCompletion)
	return &adminv1.ListNamesResponse{Names: names}, failFind(err)
}

// NewlyAllowed implements adminv1.LedgerServiceServer: what was issued under the
// revision is judged again by the revision before, with the facts that are in the
// records.
func (l *ledgerService) NewlyAllowed(req *adminv1.NewlyAllowedRequest, stream adminv1.LedgerService_NewlyAllowedServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), findTimeout)
	defer cancel()
	r, p, err := l.begin(stream, req.GetPage())
	if err != nil {
		return err
	}
	if err := checkFilters(req.GetEntry()); err != nil {
		return err
	}
	changes, err := r.EntryChanges(ctx, req.GetEntry())
	if err != nil {
		return failFind(err)
	}
	c, err := l.s.compare(changes, req.GetEntry(), req.GetRevision())
	if err != nil {
		return err
	}
	q := search.Query{
		Entry: req.GetEntry(), Revision: c.revision, Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		Since: c.since.Add(-requestSlack), Oldest: true, Limit: search.MaxFound, After: p.next,
	}
	if !c.until.IsZero() {
		q.Until = c.until.Add(requestSlack)
	}
	return l.judge(ctx, r, c, p, q, stream)
}

// judge sends what is newly allowed, up to the page's limit, or until so much was
// judged that the rest has to wait for the next page.
func (l *ledgerService) judge(ctx context.Context, r Records, c *comparison, p *page, q search.Query, stream adminv1.LedgerService_NewlyAllowedServer) error {
	resp := c.response()
	var judged, listed, bytes int
	for {
		found, next, err := r.Find(ctx, q)
		if err != nil {
			return failFind(err)
		}
		for i, f := range found {
			judged++
			resp.Judged++
			miss, allowed := c.judge(f.Record)
			if !allowed {
				resp.Issuances = append(resp.Issuances, &adminv1.NewlyAllowedResponse_Issuance{
					Issued: ledgerRecord(f), Field: miss.Field, Term: miss.Term, Why: truncate(miss.Why),
				})
				listed++
				bytes += len(f.Raw)
			}
			if listed == p.limit && (next.Valid || i+1 < len(found)) {
				resp.NextPageToken = token(search.Position{Key: toNanos(f.Record), Record: f.Index})
				return stream.Send(resp)
			}
			if bytes > maxPart {
				if err := stream.Send(resp); err != nil {
					return err
				}
				resp, bytes = c.response(), 0
			}
		}
		if next.Valid && judged >= maxJudged {
			resp.NextPageToken = token(next)
		}
		if !next.Valid || judged >= maxJudged {
			return stream.Send(resp)
		}
		q.After = next
	}
}

func toNanos(r *ledgerv1.Record) int64 { return r.GetTime().AsTime().UnixNano() }

// comparison is a revision of an entry and the one before.
type comparison struct {
	revision, previous uint64
	since, until       time.Time       // while the revision was the newest; until is zero if it is
	before             *identity.Entry // nil if there was none
	verdicts           map[[32]byte]identity.Miss
}

func (c *comparison) response() *adminv1.NewlyAllowedResponse {
	return &adminv1.NewlyAllowedResponse{Revision: c.revision, PreviousRevision: c.previous}
}

// compare finds a revision of an entry (the newest that was applied, if it is 0)
// and the one before among the entry's changes.
func (s *Server) compare(changes []search.Found, entry string, revision uint64) (*comparison, error) {
	at := -1 // of the revision's record
	for i, ch := range changes {
		applied := ch.Record.GetEvent() == ledgerv1.Event_EVENT_ENTRY_APPLIED
		if applied && (revision == 0 || ch.Record.GetEntry().GetRevision() == revision) {
			at = i
		}
	}
	if at < 0 {
		return nil, fail(kindNotFound, fmt.Sprintf("the ledger has no record of this revision of entry %q having been applied: "+
			"`ca ledger find --entry NAME --event entry_applied` shows those that it has", truncate(entry)), nil)
	}
	target := changes[at].Record
	c := &comparison{
		revision: target.GetEntry().GetRevision(), since: target.GetTime().AsTime(), verdicts: make(map[[32]byte]identity.Miss),
	}
	for _, ch := range changes[at+1:] {
		if ch.Record.GetEvent() != ledgerv1.Event_EVENT_ENTRY_LOADED {
			c.until = ch.Record.GetTime().AsTime()
			break
		}
	}
	if at == 0 || changes[at-1].Record.GetEvent() == ledgerv1.Event_EVENT_ENTRY_DELETED {
		if at == 0 && changed(target.GetDiff()) {
			return nil, fail(kindConflict, fmt.Sprintf("the revision of entry %q before %d is not in the ledger any more: it was archived",
				truncate(entry), c.revision), nil)
		}
		return c, nil // the entry is new: all that it allows is
	}
	before := changes[at-1].Record
	c.previous = before.GetEntry().GetRevision()
	if before.GetDefinition() == nil {
		return nil, fail(kindConflict, fmt.Sprintf("the record of revision %d of entry %q does not hold its definition", c.previous, truncate(entry)), nil)
	}
	var err error
	if c.before, err = identity.Compile(s.cfg.TrustDomain, before.GetDefinition()); err != nil {
		// It never gave an identity.
		c.before = nil
		s.log.Debug("revision before does not compile", "entry", entry, "revision", c.previous, "err", err)
	}
	return c, nil
}

// changed reports whether a diff is of something that was there before.
func changed(diff string) bool {
	for line := range strings.Lines(diff) {
		if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "-") && !strings.HasPrefix(line, "---") {
			return true
		}
	}
	return false
}

// judge reports whether the revision before allowed what was issued, or why not.
func (c *comparison) judge(r *ledgerv1.Record) (identity.Miss, bool) {
	if c.before == nil {
		return identity.Miss{Field: "entry", Why: "the entry did not exist, or was not in force"}, false
	}
	facts := &ledgerv1.Record{
		Workload: r.GetWorkload(), Node: &ledgerv1.NodeRef{Attributes: r.GetNode().GetAttributes()}, SpiffeId: r.GetSpiffeId(),
		Certificate: &ledgerv1.Certificate{DnsNames: r.GetCertificate().GetDnsNames()},
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(facts)
	if err != nil { // it was decoded from bytes just now
		return identity.Miss{Field: "record", Why: err.Error()}, false
	}
	key := sha256.Sum256(b)
	miss, known := c.verdicts[key]
	if !known {
		miss = missOf(c.before, facts)
		if len(c.verdicts) < maxVerdicts {
			c.verdicts[key] = miss
		}
	}
	return miss, miss == identity.Miss{}
}

// missOf says why an entry would not have given what is in a record, or returns
// the zero Miss.
func missOf(entry *identity.Entry, r *ledgerv1.Record) identity.Miss {
	facts := identity.NewFacts(r.GetNode().GetAttributes(), r.GetWorkload())
	if !entry.MatchNode(facts) || !entry.MatchWorkload(facts) {
		return entry.Explain(facts)
	}
	id, err := entry.Render(facts)
	if err != nil {
		return entry.Explain(facts)
	}
	if got := id.ID.String(); got != r.GetSpiffeId() {
		return identity.Miss{Field: "spiffe_id", Term: entry.Proto().GetSpiffeId(), Why: "it would have been " + got}
	}
	for _, name := range r.GetCertificate().GetDnsNames() {
		if !slices.Contains(id.DNSNames, name) {
			return identity.Miss{Field: "dns_names", Term: name, Why: "the certificate would not have had this name"}
		}
	}
	return identity.Miss{}
}

// Archive implements adminv1.LedgerServiceServer. It is for the admin socket only:
// it writes where the caller says.
func (l *ledgerService) Archive(req *adminv1.ArchiveRequest, stream adminv1.LedgerService_ArchiveServer) (err error) {
	ctx, cancel := context.WithTimeout(stream.Context(), archiveTimeout)
	defer cancel()
	s := l.s
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && !req.GetDryRun() {
			s.recordFailed(ctx, c, adminv1.LedgerService_Archive_FullMethodName, err)
		}
	}()
	r, err := l.records()
	if err != nil {
		return err
	}
	switch {
	case !strings.HasPrefix(c.actor, "uid:"):
		return fail(kindDenied, "the ledger is archived over the admin socket, on the CA's machine", nil)
	case req.GetBefore() == nil || time.Since(req.GetBefore().AsTime()) < leastArchiveAge:
		return fail(kindInvalid, fmt.Sprintf("before: write a time at least %s ago; certificates of later records may be valid still", leastArchiveAge), nil)
	case !filepath.IsAbs(req.GetFolder()):
		return fail(kindInvalid, "folder: write its whole path", nil)
	}
	limit, err := r.Before(ctx, req.GetBefore().AsTime())
	if err != nil {
		return failFind(err)
	}
	if s.cfg.Sinks != nil {
		if taken, sink := s.cfg.Sinks.Taken(); taken < limit {
			return fail(kindConflict, fmt.Sprintf("nothing was archived: sink %q has taken %d records and %d were to go; "+
				"wait for it, repair it, or name an earlier time", sink, taken, limit), nil)
		}
	}
	if req.GetDryRun() {
		return stream.Send(&adminv1.ArchiveResponse{Done: true, Records: limit})
	}
	report, err := s.cfg.Ledger.Archive(ctx, req.GetFolder(), limit, func(done, all int) {
		// The archive is made whether or not anybody looks on.
		_ = stream.Send(&adminv1.ArchiveResponse{Copied: uint32(done), Segments: uint32(all)}) //nolint:gosec // G115: they count segments
	}, func(a ledger.ArchiveReport) error {
		record := s.newRecord(c, ledgerv1.Event_EVENT_ARCHIVED)
		record.Archive = &ledgerv1.Archive{
			First: a.Head.Size - a.Records, End: a.Head.Size, Link: a.Head.Link[:], Folder: truncate(req.GetFolder()), Before: req.GetBefore(),
		}
		record.Detail = truncate(fmt.Sprintf("records %d to %d are in %s", record.GetArchive().GetFirst(), a.Head.Size-1, req.GetFolder()))
		return s.append(ctx, record)
	})
	if err != nil {
		s.log.ErrorContext(ctx, "ledger cannot be archived", "folder", req.GetFolder(), "actor", c.actor, "request_id", c.requestID, "err", err)
		kind := kindUnavailable
		if errors.Is(err, ledger.ErrArchive) {
			kind = kindInvalid
		}
		return fail(kind, "every record is still in the ledger or in the folder: "+truncate(err.Error()), err)
	}
	if err := r.Forget(ctx, report.Head.Size); err != nil {
		return failFind(err)
	}
	s.log.InfoContext(ctx, "ledger archived", "folder", req.GetFolder(), "records", report.Records, "head", report.Head.String(),
		"actor", c.actor, "request_id", c.requestID)
	return stream.Send(&adminv1.ArchiveResponse{
		Done: true, Segments: uint32(report.Segments), Records: report.Records, SizeBytes: uint64(report.SizeBytes), Head: report.Head.String(), //nolint:gosec // G115: they count
	})
}
