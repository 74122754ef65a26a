package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"runtime"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// The path of a signature, each step a function, in this order:
//
//  1. validate    the request, against the X.509-SVID profile
//  2. choose      the life, which never exceeds the issuer's
//  3. encode      the TBSCertificate from the authority's template
//  4. sign        with the intermediate's key, in parallel on all cores
//  5. check       what was signed: the linter, then the signature itself
//  6. record      what the ledger has to make durable before the release
//
// Nothing on it waits: the authority is one atomic load away. Where the upstream CA signs
// each leaf, steps 3 to 5 are its (leaves.go).

// Reasons of a RequestError.
const (
	// ReasonCSR: the request's form, its proof of possession, or its key.
	ReasonCSR = "csr"
	ReasonTTL = "ttl"
	// ReasonID: the SPIFFE ID.
	ReasonID  = "id"
	ReasonDNS = "dns"
)

// RequestError says that a request can never be granted as it is.
type RequestError struct {
	// Reason is one of the Reason constants.
	Reason string
	// Err says what is wrong. It quotes no more of the request than names.
	Err error
}

func (e *RequestError) Error() string { return requestNouns[e.Reason] + ": " + e.Err.Error() }

// Unwrap returns Err.
func (e *RequestError) Unwrap() error { return e.Err }

var requestNouns = map[string]string{
	ReasonCSR: "certificate signing request", ReasonTTL: "ttl", ReasonID: "spiffe id", ReasonDNS: "dns name",
}

// Request is what Sign is asked for. Identity, names and life come from the
// registration entry, never from whom the certificate is for.
type Request struct {
	ID spiffeid.ID
	// DNSNames become part of the ledger's record: they are not to be modified
	// afterwards.
	DNSNames []string
	Key      *PublicKey
	// TTL is how long the certificate is to live from now; zero means the
	// default. More than the policy allows is lowered to it.
	TTL time.Duration
	// Backdate is how far NotBefore may lie before the moment of signing at most; zero
	// means as far as configured.
	Backdate time.Duration
	// MinLife and MaxLife bound the time from NotBefore to NotAfter; zero for no bound.
	// What is more is cut off at its end, and what is less is refused.
	MinLife, MaxLife time.Duration
	// CSR is the request in PKCS #10, DER, of which Key is the key. It is needed if the
	// upstream CA signs (CA.NamesInCSR), and then has to ask for the names above.
	CSR []byte
	// Record has the facts: event, kind, node, entry, workload, instance and how
	// long the request took. Sign fills in the rest and puts it in the draft; on
	// an error it is the caller's again, for the record of the refusal. Its node
	// and instance tell whose the key is: one key is not signed for two. May be
	// nil.
	Record *ledgerv1.Record
}

// Signed is a signature that the ledger does not know yet. The certificate is
// in Draft, and can be had only by making it durable.
type Signed struct {
	Draft               *ledger.Draft
	NotBefore, NotAfter time.Time
	// RenewAt is when it should be replaced: at half of its life, spread by
	// renewJitter to either side, so that what was issued together is not
	// renewed together.
	RenewAt time.Time
	// Serial is the big-endian serial number.
	Serial []byte
}

// minRemaining is the least life with which a leaf is signed at the end of its
// authority.
const minRemaining = MinTTL / 2

// Sign makes an X.509-SVID. It returns a *RequestError for what can never be
// granted, an error that wraps ErrNoAuthority if no authority can sign at now,
// or an error that says that the result was not what was meant. In each case
// nothing was released. It waits for nothing but the processor, and may be called
// concurrently from all cores. If the upstream CA signs each leaf, it waits for that, up
// to the end of ctx, and returns a *LaterError for what may be granted later; then it
// may be called Concurrency times at once.
func (c *CA) Sign(ctx context.Context, now time.Time, r *Request) (*Signed, error) {
	return c.sign(ctx, now, r, false)
}

// Concurrency is how many calls of Sign are of use at once.
func (c *CA) Concurrency() int {
	if c.leaves != nil {
		return leafConcurrency
	}
	return runtime.GOMAXPROCS(0)
}

// sign is Sign; own is set for the CA's own X.509-SVID.
func (c *CA) sign(ctx context.Context, now time.Time, r *Request, own bool) (*Signed, error) {
	start := time.Now()
	s := c.state.Load()
	record := r.Record
	if record == nil {
		record = &ledgerv1.Record{}
	}
	if err := c.cfg.Clock(); err != nil {
		c.metrics.refused[refusedAuthority].Inc()
		return nil, fmt.Errorf("%w: %w", ErrNoAuthority, err)
	}
	// 1. Validate.
	id, refused, err := c.validate(s, r, own)
	if err != nil {
		c.metrics.refused[refused].Inc()
		return nil, err
	}
	// 2. Choose the life.
	a := s.issuer(now, own || kindOf(record) == kindAgent)
	l := leaf{id: id, dnsNames: r.DNSNames, key: r.Key}
	var shrunk int
	l.notBefore, l.notAfter, shrunk, err = c.choose(a, now, r.TTL, r.Backdate)
	if end := l.notBefore.Add(r.MaxLife); r.MaxLife > 0 && l.notAfter.After(end) {
		l.notAfter = end
	}
	if life := l.notAfter.Sub(l.notBefore); err == nil && life < r.MinLife {
		if shrunk != shrunkByAuthority {
			c.metrics.refused[refusedTTL].Inc()
			return nil, &RequestError{Reason: ReasonTTL, Err: fmt.Errorf("a life of %s: at least %s is needed here", life, r.MinLife)}
		}
		err = ErrNoAuthority // until the next one
	}
	if err != nil {
		c.wake()
		c.metrics.refused[refusedAuthority].Inc()
		return nil, c.noAuthority(s, now)
	}
	record.SpiffeId = id
	if !c.live.claim(&r.Key.hash, c.live.owner(record), now.Unix(), l.notAfter.Unix()) {
		c.metrics.refused[refusedCSR].Inc()
		return nil, &RequestError{Reason: ReasonCSR, Err: errors.New("another workload instance has a live certificate for its key: make a new key")}
	}
	var made signature
	if a.key == nil {
		err = c.signAbove(ctx, now, a, r, &l, &made)
	} else {
		err = c.signHere(a, &l, now, &made)
	}
	if err != nil {
		return nil, err
	}
	// 6. Record.
	a.sawLeaf(l.notAfter.Unix())
	c.fill(record, &made, &l, now)
	if a.listing != nil && !own {
		a.listing.signed(Leaf{
			Serial: l.serial, SPIFFEID: l.id, KeySHA256: l.key.hash,
			Node: record.GetNode().GetId(), Entry: record.GetEntry().GetName(), NotAfter: l.notAfter.Unix(),
			Requested: record.GetTime().AsTime().UnixNano(),
		}, now.Unix())
	}
	signed := &Signed{
		Draft:     ledger.NewDraft(record, made.chain),
		NotBefore: l.notBefore, NotAfter: l.notAfter,
		RenewAt: renewAt(now, l.notAfter),
		Serial:  made.serial,
	}
	if shrunk >= 0 {
		c.metrics.shrunk[shrunk].Inc()
	}
	kind := kindOf(record)
	if own {
		kind = kindOther
	}
	c.metrics.signed[kind].Inc()
	c.metrics.duration.Observe(time.Since(start).Seconds())
	return signed, nil
}

// signHere is steps 3 to 5 with the key of an intermediate.
func (c *CA) signHere(a *authority, l *leaf, now time.Time, made *signature) error {
	newSerial(&l.serial)
	// 3. Encode.
	buffer, err := a.template.appendTBS(l)
	if err != nil {
		c.metrics.refused[refusedDNS].Inc()
		return &RequestError{Reason: ReasonDNS, Err: err}
	}
	// 4. Sign.
	signature, err := a.scheme.sign(a.key, buffer[outerHead:])
	if err != nil {
		c.metrics.refused[refusedSelfCheck].Inc()
		return fmt.Errorf("sign for %s with authority %s: %w", l.id, a.id, err)
	}
	certificate := a.template.appendSignature(buffer, signature)
	// 5. Check.
	if err := c.check(a, l, now, certificate); err != nil {
		if errors.Is(err, errBadSignature) {
			// The key in memory may be damaged: Run replaces it.
			a.suspect.Store(true)
			c.wake()
		}
		c.metrics.refused[refusedSelfCheck].Inc()
		return fmt.Errorf("check the certificate for %s from authority %s: %w", l.id, a.id, err)
	}
	made.chain, made.serial, made.authority = a.under(certificate), l.serial[:], a.record
	return nil
}

// validate returns the SPIFFE ID's text.
func (c *CA) validate(s *state, r *Request, own bool) (id string, refused int, err error) {
	id, err = checkID(c.cfg.TrustDomain, r.ID)
	switch {
	case err != nil:
		return "", refusedID, &RequestError{Reason: ReasonID, Err: fmt.Errorf("%q: %w", r.ID.String(), err)}
	case !own && r.ID.Path() == ownPath:
		return "", refusedID, &RequestError{Reason: ReasonID, Err: fmt.Errorf("%q is the authority's own", id)}
	}
	if err := checkDNSNames(r.DNSNames); err != nil {
		return "", refusedDNS, &RequestError{Reason: ReasonDNS, Err: err}
	}
	if r.TTL != 0 && r.TTL < MinTTL {
		return "", refusedTTL, &RequestError{Reason: ReasonTTL, Err: fmt.Errorf("%s: at least %s is needed, or 0s for the default", r.TTL, MinTTL)}
	}
	if r.Key == nil {
		return "", refusedCSR, &RequestError{Reason: ReasonCSR, Err: errors.New("there is no key")}
	}
	if _, taken := s.keys[r.Key.hash]; taken {
		return "", refusedCSR, &RequestError{Reason: ReasonCSR, Err: errors.New("its key is that of an authority")}
	}
	return id, 0, nil
}

// choose is a pure function of its arguments and the configuration. shrunk is
// -1, or the reason why the life is shorter than asked for.
func (c *CA) choose(a *authority, now time.Time, ttl, backdate time.Duration) (notBefore, notAfter time.Time, shrunk int, err error) {
	shrunk = -1
	if a == nil || !a.usable(now) {
		return notBefore, notAfter, shrunk, ErrNoAuthority
	}
	if ttl == 0 {
		ttl = c.cfg.DefaultTTL
	}
	if ttl > c.cfg.MaxTTL {
		ttl, shrunk = c.cfg.MaxTTL, shrunkByPolicy
	}
	notAfter = floor(now.Add(ttl))
	if notAfter.After(a.leafEnd) {
		notAfter, shrunk = a.leafEnd, shrunkByAuthority
	}
	life := notAfter.Sub(now)
	// Rounded up, so that never more than a quarter of the life lies before now.
	if backdate <= 0 || backdate > c.cfg.Backdate {
		backdate = c.cfg.Backdate
	}
	notBefore = ceil(now.Add(-min(backdate, life/4)))
	if notBefore.After(now) {
		notBefore = floor(now)
	}
	return later(notBefore, a.notBefore), notAfter, shrunk, nil
}

// renewJitter is how far, in parts of half of the life, a renewal may lie to
// either side of it. What was issued at one instant, such as after an outage, is
// then renewed over 0.3 lives, at 1.7 times the rate of a fleet whose renewals
// are spread evenly; and after a few lives they are.
const renewJitter = 0.3

// renewAt is half of the life from now on, give or take renewJitter of that.
func renewAt(now, notAfter time.Time) time.Time {
	half := float64(notAfter.Sub(now)) / 2
	spread := 1 + renewJitter*(2*mathrand.Float64()-1) //nolint:gosec // spreading load needs no secrecy
	return now.Round(0).Add(time.Duration(half * spread))
}

// check reads back what was signed and verifies the signature over it. In this
// order: a bit that flips after the linter has looked breaks the signature.
func (c *CA) check(a *authority, l *leaf, now time.Time, certificate []byte) error {
	want := intent{
		issuer: a.cert.RawSubject, issuerKeyID: a.cert.SubjectKeyId, issuerKey: a.cert.PublicKey,
		issuerNotBefore: a.cert.NotBefore, issuerEnd: a.cert.NotAfter,
		trustDomain: c.cfg.TrustDomain.Name(),
		serial:      l.serial[:], spki: l.key.spki,
		id: l.id, dnsNames: l.dnsNames,
		notBefore: l.notBefore, notAfter: l.notAfter, signed: now,
		maxLife: c.cfg.MaxTTL,
	}
	got, err := want.lint(certificate)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotMeant, err)
	}
	if err := a.scheme.verify(got.tbs, got.signature); err != nil {
		return fmt.Errorf("%w: %w", errNotMeant, err)
	}
	return nil
}

// recordVersion is that of the ledger's records.
const recordVersion = 1

func (c *CA) fill(r *ledgerv1.Record, made *signature, l *leaf, now time.Time) {
	fingerprint := sha256.Sum256(made.chain[0])
	r.Version = recordVersion
	if r.Time == nil {
		r.Time = timestamppb.New(now)
	}
	if r.Event == ledgerv1.Event_EVENT_UNSPECIFIED {
		r.Event = ledgerv1.Event_EVENT_ISSUE
	}
	r.Outcome = ledgerv1.Outcome_OUTCOME_SUCCESS
	r.TrustDomain = c.cfg.TrustDomain.Name()
	r.SpiffeId = l.id
	r.Certificate = &ledgerv1.Certificate{
		Serial: made.serial, Sha256: fingerprint[:], SpkiSha256: l.key.hash[:],
		KeyAlgorithm: l.key.algorithm,
		NotBefore:    timestamppb.New(l.notBefore), NotAfter: timestamppb.New(l.notAfter),
		DnsNames: l.dnsNames,
	}
	r.Authority = made.authority
	r.CaInstance, r.CaVersion = c.cfg.Instance, c.cfg.Version
}

// noAuthority says why.
func (c *CA) noAuthority(s *state, now time.Time) error {
	if s.signer.foreign {
		return fmt.Errorf("%w: the upstream CA has signed nothing yet", ErrNoAuthority)
	}
	switch r := s.signer.cert; {
	case now.Before(r.NotBefore):
		return fmt.Errorf("%w: the root is valid from %s on, correct the clock", ErrNoAuthority, r.NotBefore.UTC().Format(time.RFC3339))
	case c.intermediateEnd(s.signer, now).Sub(now) < 2*MinTTL:
		return fmt.Errorf("%w: the root ends at %s, a new root is needed", ErrNoAuthority, r.NotAfter.UTC().Format(time.RFC3339))
	}
	if s.next != nil {
		return fmt.Errorf("%w: the revocation list of the intermediate is on its way to the proxies", ErrNoAuthority)
	}
	if failed := c.failed.Load(); failed != nil {
		return fmt.Errorf("%w: %w", ErrNoAuthority, *failed)
	}
	return fmt.Errorf("%w: the intermediate is being renewed", ErrNoAuthority)
}
