package agent

// How X.509-SVIDs are had from the CA:
//
//  1. issue, one goroutine, takes what the cache wants and makes batches of it;
//  2. ask has one batch issued, each with a key of its own;
//  3. accept checks each certificate as if the CA were hostile;
//  4. the results go to the cache, which publishes them.

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	// maxBatch bounds the items of one request (the CA accepts 512), maxFlights
	// the requests on their way.
	maxBatch   = 128
	maxFlights = 4
	// chunk is how many results are checked before they are published.
	chunk = 16
	// staleAfter is how long a missing session is no news.
	staleAfter = 30 * time.Second
	// settled is how long a session lasts before it is believed in without a
	// message from the CA.
	settled = 5 * time.Second
)

// issue hands the cache's requests to the CA until ctx ends.
func (a *Agent) issue(ctx context.Context) error {
	var swept, shown time.Time
	for {
		now := time.Now()
		a.mu.Lock()
		room := 0
		s := a.session
		if s != nil {
			room = (maxFlights - a.flights) * maxBatch
		}
		r := a.take(now, room)
		for first := 0; first < len(r.Issue); first += maxBatch {
			batch := r.Issue[first:min(first+maxBatch, len(r.Issue))]
			facts := make([]facts, len(batch))
			for n, q := range batch {
				of := subject{q.Instance, q.Digest}
				facts[n].attributes, facts[n].process = a.attributes[of], a.processes[of]
			}
			a.flights++
			s.calls.Add(1)
			a.tasks.Go(func() {
				defer s.calls.Done()
				a.ask(ctx, s, batch, facts)
			})
		}
		wait := idle
		if !r.Next.IsZero() {
			wait = min(wait, max(min(r.Next.Sub(now), r.Next.Round(0).Sub(now.Round(0))), 0))
		}
		a.wakesAt = now.Round(0).Add(wait)
		a.mu.Unlock()
		if now.Sub(shown) >= time.Second {
			shown = now
			a.showConditions(now)
		}
		if now.Sub(swept) >= idle {
			swept = now
			a.sweep()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// sweep ends the streams of processes that are gone, and forgets what nobody
// needs.
func (a *Agent) sweep() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for id, s := range a.streams {
		select {
		case <-s.peer.Done():
			a.forget(id, s)
			a.cache.Detach(now, id)
			err := s.peer.Alive()
			if err == nil {
				err = ErrInstanceEnded
			}
			s.watch.End(err)
		default:
		}
	}
	a.settle(now)
	a.prune()
}

// result is what became of one request.
type result struct {
	svid    *identity.SVID
	refusal *nodev1.Refusal
	err     error
	invalid bool // err is about what the CA sent
}

// facts are what the CA is told of a workload.
type facts struct {
	attributes *attributesv1.Workload
	process    *attributesv1.Process // nil if none has an open stream
}

// ask has one batch issued and tells the cache.
func (a *Agent) ask(ctx context.Context, s *session, batch []cache.Request, facts []facts) {
	results := make([]result, len(batch))
	response, pairs, err := a.call(ctx, s, batch, facts)
	defer func() {
		a.mu.Lock()
		a.flights--
		a.mu.Unlock()
		signal(a.wake)
	}()
	if err != nil {
		for n := range results {
			results[n].err = err
		}
		a.deliver(ctx, batch, results)
		if status.Code(err) == codes.Unauthenticated {
			s.end(fmt.Errorf("issue: %w", err)) // it may be this session's X.509-SVID
		}
		return
	}
	for first := 0; first < len(batch); first += chunk {
		last := min(first+chunk, len(batch))
		a.mu.Lock()
		bundle := a.bundle
		a.mu.Unlock()
		for n := first; n < last; n++ {
			results[n] = a.accept(time.Now(), batch[n], response.GetResults()[n], pairs[n], bundle)
		}
		a.deliver(ctx, batch[first:last], results[first:last])
	}
}

// call sends one batch.
func (a *Agent) call(ctx context.Context, s *session, batch []cache.Request, facts []facts) (*nodev1.IssueResponse, []*keyPair, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	request := &nodev1.IssueRequest{Items: make([]*nodev1.IssueItem, len(batch))}
	pairs := make([]*keyPair, len(batch))
	named := a.namesInCSR.Load()
	for n, q := range batch {
		pair, err := a.keys.take()
		if err != nil {
			return nil, nil, err
		}
		pairs[n] = pair
		csr := pair.csr
		if named {
			if csr, err = pkcs10.Sign(pair.key, pkcs10.Names{URI: q.Identity.ID.String(), DNS: q.Identity.DNSNames}); err != nil {
				return nil, nil, fmt.Errorf("create CSR: %w", err)
			}
		}
		request.Items[n] = &nodev1.IssueItem{
			Entry:          q.Identity.Entry.Name(),
			Csr:            csr,
			Instance:       q.Instance,
			Workload:       facts[n].attributes,
			Process:        facts[n].process,
			Kind:           kindOf(q.Kind),
			PreviousSerial: q.PreviousSerial,
		}
	}
	began := time.Now()
	response, err := s.client.Issue(ctx, request)
	a.metrics.calls.Observe(time.Since(began).Seconds())
	if err != nil {
		return nil, nil, fmt.Errorf("issue: %w", err)
	}
	if len(response.GetResults()) != len(batch) {
		return nil, nil, fmt.Errorf("issue: the CA answered %d of %d items", len(response.GetResults()), len(batch))
	}
	return response, pairs, nil
}

func kindOf(k cache.Kind) nodev1.IssueKind {
	switch k {
	case cache.First:
		return nodev1.IssueKind_ISSUE_KIND_FIRST
	case cache.Renewal:
		return nodev1.IssueKind_ISSUE_KIND_RENEWAL
	case cache.Rotation:
		return nodev1.IssueKind_ISSUE_KIND_ROTATION
	default:
		return nodev1.IssueKind_ISSUE_KIND_UNSPECIFIED
	}
}

// accept checks one result. What it returns as an SVID is for our key, says what
// our own rendering of the entry says, and chains to the bundle that is served
// with it.
func (a *Agent) accept(now time.Time, q cache.Request, r *nodev1.IssueResult, pair *keyPair, bundle *identity.Bundle) result {
	switch r := r.GetResult().(type) {
	case *nodev1.IssueResult_Refusal:
		return result{refusal: r.Refusal}
	case *nodev1.IssueResult_Svid:
		var proof *identity.Proof
		chain, err := a.parser.chain(r.Svid.GetChain())
		if err == nil {
			proof, err = a.parser.verify(now, chain, bundle.Roots, expectation{
				key: pair.key, id: exactly(q.Identity.ID), dnsNames: q.Identity.DNSNames,
				usage: x509.ExtKeyUsageClientAuth, maxLife: identity.MaxTTL + lifeSlack,
			})
		}
		if err == nil && !bundle.Listed(chain) {
			err = errors.New("is of an issuer without a revocation list: whoever goes by lists would refuse it")
		}
		if err != nil {
			return result{err: fmt.Errorf("verify the X.509-SVID: it %w", err), invalid: true}
		}
		return result{svid: &identity.SVID{
			ID: q.Identity.ID, Chain: a.parser.keep(chain), Proof: proof, Key: pair.key, Hint: q.Identity.Hint,
			Entry: q.Identity.Entry.Name(), RenewAt: r.Svid.GetRenewAt().AsTime(),
		}}
	default:
		return result{err: errors.New("verify the X.509-SVID: the answer of the CA is empty"), invalid: true}
	}
}

// deliver tells the cache what became of requests.
func (a *Agent) deliver(ctx context.Context, batch []cache.Request, results []result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for n, q := range batch {
		r := results[n]
		o := succeeded
		switch {
		case r.svid != nil:
			a.cfg.Health.Clear(condClock)
			a.report.held = true
			signal(a.up)
			if a.cache.Issued(now, q.ID, r.svid) {
				a.metrics.lag.Observe(max(now.Sub(q.Due).Seconds(), 0))
			}
		case r.refusal != nil:
			o = refused
			retry := time.Duration(-1)
			if r.refusal.GetRetryAfter() != nil {
				retry = max(r.refusal.GetRetryAfter().AsDuration(), 0)
			}
			a.cache.Refused(now, q.ID, "the CA refuses: "+r.refusal.GetMessage(), retry)
			a.log.WarnContext(ctx, "svid is refused", "entry", q.Identity.Entry.Name(), "spiffe_id", q.Identity.ID.String(),
				"instance", q.Instance, "reason", r.refusal.GetReason().String(), "err", r.refusal.GetMessage())
		default:
			o = failed
			if r.invalid {
				o = invalid
				if errors.Is(r.err, errClock) {
					a.cfg.Health.Set(condClock, health.Error, r.err.Error())
				}
				a.log.ErrorContext(ctx, "svid of the ca is not accepted", "entry", q.Identity.Entry.Name(),
					"spiffe_id", q.Identity.ID.String(), "instance", q.Instance, "err", r.err)
			} else {
				a.log.DebugContext(ctx, "svid is not issued", "entry", q.Identity.Entry.Name(), "instance", q.Instance, "err", r.err)
			}
			a.cache.Failed(now, q.ID, r.err.Error())
		}
		a.metrics.renewals.WithLabelValues(q.Kind.String(), string(o)).Inc()
	}
	a.settle(now)
}

// showConditions reports how the agent is.
func (a *Agent) showConditions(now time.Time) {
	a.mu.Lock()
	stats := a.cache.Stats(now)
	connected, since := a.session != nil, a.since
	a.mu.Unlock()
	h := a.cfg.Health
	if stats.Limited == 0 && !stats.Full {
		h.Clear(condCapacity)
	}
	if connected && now.Sub(since) >= settled {
		h.Clear(condCA)
	}
	switch gap := now.Sub(since); {
	case connected || stats.SVIDs == 0 || gap < staleAfter:
		h.Clear(condStale)
	default:
		severity := health.Warning
		left := stats.MinNotAfter.Sub(now.Round(0))
		if left < gap/4 {
			severity = health.Error // most of what there was to survive on is used up
		}
		h.Set(condStale, severity, fmt.Sprintf("serving what is at hand: no CA since %s, the first X.509-SVID expires at %s",
			since.UTC().Format(time.RFC3339), stats.MinNotAfter.UTC().Format(time.RFC3339)))
	}
	switch {
	case stats.Overdue > 0:
		h.Set(condRenewal, health.Warning, fmt.Sprintf("%d X.509-SVIDs are overdue for renewal", stats.Overdue))
	case stats.Refused > 0:
		h.Set(condRenewal, health.Warning, fmt.Sprintf("%d identities are refused by the CA or cannot be had: see `node-agent status`", stats.Refused))
	default:
		h.Clear(condRenewal)
	}
}
