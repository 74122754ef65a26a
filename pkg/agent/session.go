package agent

// The agent's life with the CA:
//
//  1. follow makes sessions, one after the other, with back-off between them;
//  2. attestNode proves which machine this is, whenever the agent has no
//     X.509-SVID that is good for a session;
//  3. open makes a connection with that X.509-SVID, and the Sync stream;
//  4. receive carries out what comes down the stream (sync.go), tell sends up
//     what there is to say, keepOwn renews the agent's own X.509-SVID: then the
//     next session is opened before this one is closed.

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	// attemptTimeout bounds an attestation of this node, and what a call to the
	// CA may take.
	attemptTimeout = 30 * time.Second
	callTimeout    = 15 * time.Second
	// maxChallenges bounds those of one attestation.
	maxChallenges = 16
	// maxMessage bounds what the CA may send at once: a snapshot of all entries.
	maxMessage = 64 << 20
	// stable is how long a session lasts before its end counts as the first
	// failure again.
	stable = 30 * time.Second
)

// sessionBackoff is between sessions. A refusal is waited for as long as a
// failure: a machine that slept is back within a minute.
var sessionBackoff = backoff.Policy{Base: time.Second, Max: 30 * time.Second}

// Reasons for the end of a session that are not failures.
var (
	errRenewed = errors.New("the agent's X.509-SVID was renewed")
	errEvicted = errors.New("the CA has evicted this node")
	errResync  = errors.New("revisions do not follow each other")
)

// ownIdentity is the agent's own X.509-SVID.
type ownIdentity struct {
	id      spiffeid.ID
	key     *ecdsa.PrivateKey
	chain   []*x509.Certificate
	renewAt time.Time // may carry both clocks, see cache.RenewIn
}

func (o *ownIdentity) notAfter() time.Time { return o.chain[0].NotAfter }

func (o *ownIdentity) usable(now time.Time) bool { return o != nil && o.notAfter().After(now.Round(0)) }

// certificate returns o as it is shown in a handshake.
func (o *ownIdentity) certificate() *tls.Certificate {
	c := &tls.Certificate{PrivateKey: o.key, Leaf: o.chain[0]}
	for _, cert := range o.chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// session is one connection to the CA that is authenticated by the agent's own
// X.509-SVID.
type session struct {
	conn   *grpc.ClientConn
	client nodev1.NodeServiceClient
	own    *ownIdentity
	calls  sync.WaitGroup // calls of Issue
	end    context.CancelCauseFunc
}

// follow keeps a session with the CA until ctx ends.
func (a *Agent) follow(ctx context.Context) error {
	tries := backoff.New(sessionBackoff)
	defer a.install(nil)
	for {
		start := time.Now()
		err := a.attempt(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errRenewed) {
			tries.Reset()
			a.metrics.connects.WithLabelValues(string(succeeded)).Inc()
			continue
		}
		a.metrics.connects.WithLabelValues(string(failed)).Inc()
		if time.Since(start) >= stable {
			tries.Reset()
		}
		a.disconnected(ctx, err)
		if backoff.Wait(ctx, tries.Next()) != nil {
			return nil
		}
	}
}

// disconnected notes that there is no session any more.
func (a *Agent) disconnected(ctx context.Context, err error) {
	a.mu.Lock()
	if a.session != nil {
		a.since = time.Now()
	}
	first := a.session != nil || a.lastError == ""
	a.lastError = err.Error()
	a.mu.Unlock()
	a.install(nil)
	a.cfg.Health.Set(condCA, health.Warning, "no session with the CA: "+err.Error())
	if errors.Is(err, errClock) {
		a.cfg.Health.Set(condClock, health.Error, err.Error())
	}
	if first {
		a.log.WarnContext(ctx, "no session with the ca", "err", err)
	} else {
		a.log.DebugContext(ctx, "no session with the ca", "err", err)
	}
}

// install puts a session (or none) into force and closes the one before once its
// calls are done.
func (a *Agent) install(next *session) {
	a.mu.Lock()
	old := a.session
	a.session = next
	a.skew.next = time.Time{}
	if next != nil {
		if old == nil {
			a.since = time.Now()
		}
		a.lastError = ""
	}
	a.mu.Unlock()
	if old == nil {
		return
	}
	old.end(errRenewed)
	a.tasks.Go(func() {
		old.calls.Wait() // each has its deadline
		_ = old.conn.Close()
	})
}

// attempt makes sure that the agent has an X.509-SVID and runs one session with
// it. It always returns an error.
func (a *Agent) attempt(ctx context.Context) error {
	a.mu.Lock()
	own, again := a.own, a.reattest
	a.mu.Unlock()
	if !own.usable(time.Now()) || again {
		if err := a.attestNode(ctx); err != nil {
			if !own.usable(time.Now()) {
				return err
			}
			// The CA may have changed its mind, and until this X.509-SVID
			// expires it costs nothing to ask.
			a.log.WarnContext(ctx, "node is not attested again", "err", err)
		}
		a.mu.Lock()
		own, a.reattest = a.own, false
		a.mu.Unlock()
		if !own.usable(time.Now()) {
			return errors.New("the node's identity was taken away while it was attested")
		}
	}
	return a.converse(ctx, own)
}

// dial makes a connection that is used for one session or attestation; when it
// is lost, so are they.
func (a *Agent) dial(own *ownIdentity, anchors *trust) (*grpc.ClientConn, error) {
	var certificate func() *tls.Certificate
	if own != nil {
		certificate = own.certificate
	}
	target := a.cfg.CAAddress
	if !strings.Contains(target, "://") {
		target = "dns:///" + target
	}
	options := append([]grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(
			tlsToCA(a.cfg.TrustDomain, anchors, certificate))),
		// A peer that vanished is noticed within 15 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		// Each address has this long; a dead one does not stop the next.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.5, MaxDelay: 10 * time.Second},
			MinConnectTimeout: 4 * time.Second,
		}),
		grpc.WithDisableServiceConfig(),
		// Windows that are fixed: gRPC would find out how large they should be with
		// a ping for each call, which the CA has to answer.
		grpc.WithStaticStreamWindowSize(1 << 20),
		grpc.WithStaticConnWindowSize(2 << 20),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithUserAgent("meshid-agent/" + a.cfg.Version),
	}, a.cfg.DialOptions...)
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, fmt.Errorf("dial the CA at %s: %w", a.cfg.CAAddress, err)
	}
	return conn, nil
}

// attestNode proves which machine this is and takes the agent's X.509-SVID.
func (a *Agent) attestNode(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	result, err := a.proveNode(ctx)
	switch {
	case err == nil:
		a.metrics.nodes.WithLabelValues(string(succeeded)).Inc()
	case isRefusal(err):
		a.metrics.nodes.WithLabelValues(string(refused)).Inc()
		a.cfg.Health.Set(condNode, a.withoutIdentity(), "the CA refuses to attest this node: "+err.Error()+
			": make a new join token, or look at the node's certificate and at `ca node`"+a.whatWasLost())
	default:
		a.metrics.nodes.WithLabelValues(string(failed)).Inc()
		a.cfg.Health.Set(condNode, a.withoutIdentity(), "this node is not attested: "+err.Error())
	}
	if err != nil {
		return fmt.Errorf("attest this node: %w", err)
	}
	a.adopt(result)
	a.cfg.Health.Clear(condNode)
	a.cfg.Health.Clear(condClock)
	a.log.InfoContext(ctx, "node attested", "method", a.cfg.Node.Method(), "node_id", result.own.id.String(),
		"not_after", result.own.notAfter())
	return a.writeNow(ctx)
}

// whatWasLost says why the node has to be attested though it was before, if that
// is so.
func (a *Agent) whatWasLost() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dropped == nil {
		return ""
	}
	return "; the identity that it had was in the sealed cache: " + a.dropped.Error()
}

// withoutIdentity is how bad it is that the node cannot be attested.
func (a *Agent) withoutIdentity() health.Severity {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.own.usable(time.Now()) {
		return health.Warning
	}
	return health.Error
}

// isRefusal says whether the CA decided against the node, rather than being
// unable to decide.
func isRefusal(err error) bool {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound:
		return true
	default:
		return false
	}
}

// granted is what Attest and Renew return, verified.
type granted struct {
	own    *ownIdentity
	bundle *identity.Bundle
}

// proveNode runs the attestation.
func (a *Agent) proveNode(ctx context.Context) (*granted, error) {
	pair, err := a.keys.take()
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(pair.key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	binding := sha256.Sum256(spki)
	evidence, err := a.cfg.Node.Evidence(ctx, binding[:])
	if err != nil {
		return nil, fmt.Errorf("gather evidence: %w", err)
	}
	start := &nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: &nodev1.AttestStart{
		Method: a.cfg.Node.Method(), Evidence: evidence, Csr: pair.csr, AgentVersion: a.cfg.Version,
	}}}
	answer, err := a.askAttestation(ctx, start, pair.key, binding[:])
	if err != nil {
		return nil, err
	}
	return a.verifyGranted(answer, pair.key)
}

// askAttestation talks to a CA that the bundle at hand verifies. Where that
// fails (the agent has been away for longer than the roots it knows), the
// configured anchors or pin are asked.
func (a *Agent) askAttestation(ctx context.Context, start *nodev1.AttestRequest, key *ecdsa.PrivateKey, binding []byte) (*nodev1.AgentIdentity, error) {
	a.mu.Lock()
	bundle := a.bundle
	a.mu.Unlock()
	if bundle != nil {
		answer, untrusted, err := a.attestOver(ctx, bundle.Roots, nil, start, key, binding)
		if err == nil || !untrusted {
			return answer, err
		}
	}
	answer, _, err := a.attestOver(ctx, a.cfg.TrustAnchors, a.cfg.RootSHA256, start, key, binding)
	return answer, err
}

// attestOver runs the Attest call over a connection of its own. untrusted says
// that the peer did not prove to be the CA.
func (a *Agent) attestOver(ctx context.Context, roots []*x509.Certificate, pin []byte, start *nodev1.AttestRequest, key *ecdsa.PrivateKey, binding []byte) (answer *nodev1.AgentIdentity, untrusted bool, err error) {
	trust := &trust{roots: roots, pin: pin}
	conn, err := a.dial(nil, trust)
	if err != nil {
		return nil, false, err
	}
	defer conn.Close() //nolint:errcheck // nothing can be done, and nothing is lost
	answer, err = a.attestWith(ctx, conn, start, key, binding)
	return answer, trust.failed.Load(), err
}

// attestWith is the dialogue of an attestation.
func (a *Agent) attestWith(ctx context.Context, conn *grpc.ClientConn, start *nodev1.AttestRequest, key *ecdsa.PrivateKey, binding []byte) (*nodev1.AgentIdentity, error) {
	stream, err := nodev1.NewNodeServiceClient(conn).Attest(ctx)
	if err != nil {
		return nil, fmt.Errorf("call the CA: %w", err)
	}
	// An error of Send says only that the stream has ended; Recv says why.
	sendErr := stream.Send(start)
	for range maxChallenges + 1 {
		m, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("hear the CA: %w", errors.Join(err, ignoreEOF(sendErr)))
		}
		switch step := m.GetStep().(type) {
		case *nodev1.AttestResponse_Identity:
			return step.Identity, nil
		case *nodev1.AttestResponse_Challenge:
			response, err := a.cfg.Node.Respond(ctx, binding, step.Challenge)
			if err != nil {
				return nil, fmt.Errorf("answer the CA's challenge: %w", err)
			}
			sendErr = stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Response{Response: response}})
		case *nodev1.AttestResponse_Name:
			// What it may not ask for is refused when it comes back.
			csr, err := pkcs10.Sign(key, pkcs10.Names{URI: step.Name})
			if err != nil {
				return nil, fmt.Errorf("create CSR: %w", err)
			}
			sendErr = stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Response{Response: csr}})
		default:
			return nil, errors.New("the CA sent a step of attestation that this agent does not know")
		}
	}
	return nil, fmt.Errorf("the CA asked more than %d challenges", maxChallenges)
}

// verifyGranted checks what the CA gave the agent as if it were hostile.
func (a *Agent) verifyGranted(answer *nodev1.AgentIdentity, key *ecdsa.PrivateKey) (*granted, error) {
	bundle, err := parseBundle(a.cfg.TrustDomain, answer.GetBundle())
	if err != nil {
		return nil, fmt.Errorf("verify the CA's answer: %w", err)
	}
	a.mu.Lock()
	if a.bundle != nil && a.bundle.Sequence >= bundle.Sequence {
		bundle = a.bundle // an older one is not believed
	}
	a.mu.Unlock()
	own, err := a.verifyOwn(time.Now(), answer.GetChain(), bundle, key)
	if err != nil {
		return nil, fmt.Errorf("verify the agent's X.509-SVID: it %w", err)
	}
	own.renewAt = renewTime(time.Now(), answer.GetRenewAt().AsTime(), own.notAfter())
	return &granted{own: own, bundle: bundle}, nil
}

// verifyOwn checks a chain that is to be the agent's own.
func (a *Agent) verifyOwn(now time.Time, der [][]byte, bundle *identity.Bundle, key *ecdsa.PrivateKey) (*ownIdentity, error) {
	chain, err := a.parser.chain(der)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	own := &ownIdentity{key: key, chain: chain}
	prefix := a.cfg.TrustDomain.IDString() + identity.ReservedPath + "node/" + a.cfg.Node.Method() + "/"
	_, err = a.parser.verify(now, chain, bundle.Roots, expectation{
		key: key, usage: x509.ExtKeyUsageClientAuth, maxLife: 31 * 24 * time.Hour,
		id: func(uri string) error {
			if !strings.HasPrefix(uri, prefix) {
				return fmt.Errorf("is for %.2048q, which is not below %s", uri, prefix)
			}
			id, err := identity.ParseID(uri)
			own.id = id
			return err
		},
	})
	return own, err
}

// renewTime is when to renew, in both clocks.
func renewTime(now, renewAt, notAfter time.Time) time.Time {
	return now.Add(cache.RenewIn(now, renewAt, notAfter))
}

// adopt puts the agent's new X.509-SVID into force.
func (a *Agent) adopt(g *granted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.own, a.reattest, a.dropped = g.own, false, nil
	a.report.held = true
	signal(a.up)
	if a.bundle == nil || g.bundle.Sequence > a.bundle.Sequence {
		a.setBundle(g.bundle)
	}
	signal(a.save)
}

// setBundle puts a bundle into force. a.mu is held.
func (a *Agent) setBundle(b *identity.Bundle) {
	now := time.Now()
	a.bundle, a.bundled = b, now
	a.cache.SetBundle(now, b)
	a.report.applied, a.report.acks = true, true
	a.settle(now)
	signal(a.save)
	signal(a.up)
}

// converse runs one session.
func (a *Agent) converse(ctx context.Context, own *ownIdentity) error {
	a.mu.Lock()
	bundle := a.bundle
	hello := &nodev1.Hello{AgentVersion: a.cfg.Version, Epoch: a.epoch, Revision: a.revision, Rotated: a.rotated, QuarantineSequence: a.quarantined, ReportsWithdrawals: true}
	if bundle != nil {
		hello.BundleSequence = bundle.Sequence
	}
	a.mu.Unlock()
	if bundle == nil {
		return errors.New("no trust bundle to verify the CA with")
	}
	conn, err := a.dial(own, &trust{roots: bundle.Roots})
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	s := &session{conn: conn, client: nodev1.NewNodeServiceClient(conn), own: own, end: end}
	stream, err := s.client.Sync(ctx)
	if err == nil {
		err = stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: hello}})
	}
	if err != nil {
		if stream != nil {
			if _, rerr := stream.Recv(); rerr != nil {
				err = rerr
			}
		}
		end(nil)
		_ = conn.Close()
		return a.judge(fmt.Errorf("open a session with the CA: %w", err))
	}
	a.install(s)
	a.mu.Lock()
	a.report.applied, a.report.acks = true, true
	a.reporting, a.leaving = false, false
	a.cache.Resume(time.Now())
	a.settle(time.Now())
	a.mu.Unlock()
	signal(a.wake)
	a.log.InfoContext(ctx, "session with the ca", "node_id", own.id.String(), "revision", hello.GetRevision())

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		// Recv ends with the stream's context, not with gctx.
		err := a.receive(gctx, stream, end)
		end(err)
		return err
	})
	g.Go(func() error {
		err := a.tell(gctx, stream)
		end(err)
		return err
	})
	g.Go(func() error {
		err := a.keepOwn(gctx, s)
		end(err)
		return err
	})
	err = g.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return a.judge(err)
}

// judge draws the conclusions from the reason why a session ended.
func (a *Agent) judge(err error) error {
	switch code := status.Code(err); {
	case errors.Is(err, errEvicted) || errors.Is(err, errRenewed) || errors.Is(err, errResync):
	case code == codes.Unauthenticated:
		a.mu.Lock()
		a.reattest = true
		a.mu.Unlock()
	case code == codes.PermissionDenied:
		// The CA, known by its certificate, denies this node: it is banned.
		a.evict("denied by the CA", true)
		return errors.Join(errEvicted, err)
	default:
	}
	return err
}

// evict withdraws everything.
func (a *Agent) evict(reason string, banned bool) {
	a.mu.Lock()
	now := time.Now()
	a.own, a.node = nil, nil
	a.raw, a.entries, a.epoch, a.revision = nil, nil, "", 0
	a.withdrawing(&withdrawal{cause: nodev1.Cause_CAUSE_EVICTION, at: now}, func() {
		a.cache.Evict(now)
		a.settle(now)
	})
	a.mu.Unlock()
	signal(a.save)
	what := "evicted"
	if banned {
		what = "banned"
	}
	a.cfg.Health.Set(condNode, health.Error, "this node was "+what+" by the CA: "+reason)
	a.log.Error("node was evicted, all identities are withdrawn", "reason", reason, "banned", banned)
}

// keepOwn renews the agent's own X.509-SVID when its time has come. It returns
// errRenewed, or an error when the X.509-SVID is good for nothing any more.
func (a *Agent) keepOwn(ctx context.Context, s *session) error {
	tries := backoff.New(sessionBackoff)
	at := s.own.renewAt
	for {
		now := time.Now()
		if !s.own.usable(now) {
			return errors.New("the agent's X.509-SVID has expired")
		}
		// Asked again and again: the machine may have slept.
		wait := min(at.Sub(now), at.Round(0).Sub(now.Round(0)), s.own.notAfter().Sub(now.Round(0)), idle)
		if wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return context.Cause(ctx)
			case <-a.renew:
				a.mu.Lock()
				if a.own != nil {
					at = a.own.renewAt
				}
				a.mu.Unlock()
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		err := a.renewOwn(ctx, s)
		if err == nil {
			return errRenewed
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a.log.WarnContext(ctx, "agent's own svid is not renewed", "err", err, "not_after", s.own.notAfter())
		if status.Code(err) == codes.Unauthenticated {
			return err // attest again
		}
		at = time.Now().Add(max(tries.Next(), time.Second))
	}
}

// renewOwn replaces the agent's X.509-SVID.
func (a *Agent) renewOwn(ctx context.Context, s *session) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pair, err := a.keys.take()
	if err != nil {
		return err
	}
	csr, err := pkcs10.Sign(pair.key, pkcs10.Names{URI: s.own.id.String()})
	if err != nil {
		return fmt.Errorf("create CSR: %w", err)
	}
	answer, err := s.client.Renew(ctx, &nodev1.RenewRequest{
		Csr: csr, PreviousSerial: s.own.chain[0].SerialNumber.Bytes(),
	})
	if err != nil {
		o := failed
		if isRefusal(err) {
			o = refused
		}
		a.metrics.renewals.WithLabelValues(kindAgent, string(o)).Inc()
		return fmt.Errorf("renew the agent's X.509-SVID: %w", err)
	}
	g, err := a.verifyGranted(answer.GetIdentity(), pair.key)
	if err == nil && g.own.id != s.own.id {
		err = fmt.Errorf("it is for %s, not for %s", g.own.id, s.own.id)
	}
	if err != nil {
		a.metrics.renewals.WithLabelValues(kindAgent, string(invalid)).Inc()
		return err
	}
	a.metrics.renewals.WithLabelValues(kindAgent, string(succeeded)).Inc()
	a.metrics.lag.Observe(max(time.Since(s.own.renewAt).Seconds(), 0))
	a.adopt(g)
	a.cfg.Health.Clear(condNode)
	// Before it is used: after a crash, an older one would betray a copy.
	return a.writeNow(context.WithoutCancel(ctx))
}

// serialText is how serials are written.
func serialText(serial *big.Int) string { return hex.EncodeToString(serial.Bytes()) }
