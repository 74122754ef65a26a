package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

// role is what a caller has to be for a method.
type role int

const (
	// roleAnyone: whoever reaches the listener. Attest only.
	roleAnyone role = iota + 1
	// roleNode: an agent, with the X.509-SVID of an active node.
	roleNode
	// roleDownstream: a CA below this one, with an X.509-SVID whose SPIFFE ID is that
	// of an entry marked downstream.
	roleDownstream
	// roleAdmin: root or the CA's own user on the Unix socket, or an X.509-SVID
	// whose SPIFFE ID is that of an entry marked admin.
	roleAdmin
	// roleTwoAdmins: an admin, and with Config.TwoPersons a second one who approves
	// before it is done.
	roleTwoAdmins
)

// methods is the authorization table: what is not in it is refused.
var methods = map[string]role{
	nodev1.NodeService_Attest_FullMethodName: roleAnyone,
	nodev1.NodeService_Renew_FullMethodName:  roleNode,
	nodev1.NodeService_Sync_FullMethodName:   roleNode,
	nodev1.NodeService_Issue_FullMethodName:  roleNode,

	downstreamv1.DownstreamService_Mint_FullMethodName:   roleDownstream,
	downstreamv1.DownstreamService_Follow_FullMethodName: roleDownstream,

	adminv1.AdminService_ApplyEntries_FullMethodName:       roleAdmin,
	adminv1.AdminService_DeleteEntries_FullMethodName:      roleAdmin,
	adminv1.AdminService_ListEntries_FullMethodName:        roleAdmin,
	adminv1.AdminService_Explain_FullMethodName:            roleAdmin,
	adminv1.AdminService_EntryStatus_FullMethodName:        roleAdmin,
	adminv1.AdminService_CreateToken_FullMethodName:        roleAdmin,
	adminv1.AdminService_ListTokens_FullMethodName:         roleAdmin,
	adminv1.AdminService_DeleteToken_FullMethodName:        roleAdmin,
	adminv1.AdminService_ListNodes_FullMethodName:          roleAdmin,
	adminv1.AdminService_EvictNode_FullMethodName:          roleAdmin,
	adminv1.AdminService_BanNode_FullMethodName:            roleAdmin,
	adminv1.AdminService_UnbanNode_FullMethodName:          roleAdmin,
	adminv1.AdminService_AddQuarantine_FullMethodName:      roleAdmin,
	adminv1.AdminService_LiftQuarantine_FullMethodName:     roleAdmin,
	adminv1.AdminService_ListQuarantines_FullMethodName:    roleAdmin,
	adminv1.AdminService_ListWithdrawals_FullMethodName:    roleAdmin,
	adminv1.AdminService_GetBundle_FullMethodName:          roleAdmin,
	adminv1.AdminService_ListAuthorities_FullMethodName:    roleAdmin,
	adminv1.AdminService_RotateIntermediate_FullMethodName: roleAdmin,
	adminv1.AdminService_GetRotation_FullMethodName:        roleAdmin,
	adminv1.AdminService_ChangeRotation_FullMethodName:     roleTwoAdmins,
	adminv1.AdminService_ListRootChanges_FullMethodName:    roleAdmin,
	adminv1.AdminService_ApproveRootChange_FullMethodName:  roleAdmin,
	adminv1.AdminService_RejectRootChange_FullMethodName:   roleAdmin,
	adminv1.AdminService_RenewSVIDs_FullMethodName:         roleAdmin,
	adminv1.AdminService_ConfirmClock_FullMethodName:       roleAdmin,
	adminv1.AdminService_GetStatus_FullMethodName:          roleAdmin,

	adminv1.ConsoleService_CreateLink_FullMethodName: roleAdmin,

	adminv1.LedgerService_Find_FullMethodName:         roleAdmin,
	adminv1.LedgerService_Who_FullMethodName:          roleAdmin,
	adminv1.LedgerService_FirstSeen_FullMethodName:    roleAdmin,
	adminv1.LedgerService_Overdue_FullMethodName:      roleAdmin,
	adminv1.LedgerService_NewlyAllowed_FullMethodName: roleAdmin,
	adminv1.LedgerService_ListNames_FullMethodName:    roleAdmin,
	adminv1.LedgerService_Archive_FullMethodName:      roleAdmin,
}

// caller is who makes a call, as authorize established it.
type caller struct {
	requestID string
	address   string
	// node is set for roleNode; serial is that of the X.509-SVID presented.
	node     *registry.Node
	serial   []byte
	key      []byte // SHA-256 of its public key
	notAfter time.Time
	// actor is who calls the admin API, or would: "uid:0", or a SPIFFE ID.
	actor string
	began time.Time
	// denied is the node that a refused call came from.
	denied *registry.Node
	// recorded is set if a record of the call's refusal has been made.
	recorded bool
}

type callerKey struct{}

// callerOf returns who makes the call; authorize put it there.
func callerOf(ctx context.Context) (*caller, error) {
	c, ok := ctx.Value(callerKey{}).(*caller)
	if !ok {
		return nil, fail(kindDenied, "permission denied", errors.New("call did not pass authorization"))
	}
	return c, nil
}

// authorize is the one gate that every RPC passes, on both listeners: it names
// the caller and says whether the method is for it.
func (s *Server) authorize(ctx context.Context, method string) (*caller, error) {
	c := &caller{requestID: newRequestID(), began: time.Now()}
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return c, fail(kindDenied, "permission denied", errors.New("connection is unknown"))
	}
	if p.Addr != nil {
		c.address = p.Addr.String()
	}
	need, known := methods[method]
	if !known {
		return c, fail(kindDenied, "permission denied", errors.New("method is not in the authorization table"))
	}
	if need == roleTwoAdmins {
		need = roleAdmin // of whom the first calls; hold sees to the second
	}
	switch info := p.AuthInfo.(type) {
	case *tlsInfo:
		return c, s.authorizeTLS(ctx, c, info, need, method)
	case peer.AuthInfo:
		return c, authorizeLocal(c, info, need)
	default:
		return c, fail(kindDenied, "permission denied", fmt.Errorf("connection is authenticated by %T", p.AuthInfo))
	}
}

// authorizeTLS judges a caller by its X.509-SVID. That was verified when the
// connection was made; its life and its node are looked at again at each call.
func (s *Server) authorizeTLS(ctx context.Context, c *caller, info *tlsInfo, need role, method string) error {
	if need == roleAnyone {
		return nil
	}
	if info.id.IsZero() {
		return fail(kindUnauthenticated, "an X.509-SVID is required", nil)
	}
	if !c.began.Before(info.notAfter) {
		return fail(kindUnauthenticated, "the X.509-SVID has expired", nil)
	}
	id := info.id.String()
	c.serial, c.key, c.notAfter = info.serial, info.key, info.notAfter
	if q, ok := s.registry.Quarantines().Of(id, c.key, c.serial); ok {
		c.denied, _ = s.registry.Node(id)
		s.metrics.refused.WithLabelValues(reasonQuarantined).Inc()
		if q.SPIFFEID != "" {
			return fail(kindDenied, "the identity is quarantined", nil)
		}
		return fail(kindUnauthenticated, "the X.509-SVID is quarantined: attest again", nil)
	}
	switch need {
	case roleNode:
		if !strings.HasPrefix(info.id.Path(), identity.ReservedPath+"node/") {
			return fail(kindDenied, "permission denied", fmt.Errorf("%s is not a node", id))
		}
		n, verdict := s.registry.Authenticate(id, info.serial, c.began)
		if verdict != registry.Accepted {
			c.denied = n
		}
		switch verdict {
		case registry.Accepted:
			c.node = n
			return nil
		case registry.Inactive:
			if n.State == registry.Banned {
				return fail(kindDenied, "the node is banned", nil)
			}
			return fail(kindUnauthenticated, "the node was evicted: attest again", nil)
		case registry.Superseded:
			if method == nodev1.NodeService_Renew_FullMethodName {
				s.noteClone(ctx, c, n, info.serial)
			}
			return fail(kindUnauthenticated, "the node has a newer X.509-SVID: attest again", nil)
		case registry.Unknown:
			return fail(kindUnauthenticated, "the node is unknown: attest again", nil)
		default:
			return fail(kindDenied, "permission denied", nil)
		}
	case roleAdmin:
		c.actor = id
		// The entry is looked up now: without it, the SVID is worth nothing.
		if _, ok := s.registry.Entries().Admin(id); !ok {
			return fail(kindDenied, "permission denied", fmt.Errorf("%s is not the SPIFFE ID of an admin entry", id))
		}
		return s.checkIssuer(ctx, info.issuer)
	case roleDownstream:
		c.actor = id
		if _, ok := s.registry.Entries().Downstream(id); !ok {
			return fail(kindDenied, "permission denied: no entry marked downstream has this SPIFFE ID", fmt.Errorf("%s is not the SPIFFE ID of a downstream entry", id))
		}
		return s.checkIssuer(ctx, info.issuer)
	case roleAnyone:
		return nil
	default:
		return fail(kindDenied, "permission denied", nil)
	}
}

// authorizeLocal judges a process at the other end of the Unix socket.
func authorizeLocal(c *caller, info peer.AuthInfo, need role) error {
	if need != roleAdmin || info.Peer == nil {
		return fail(kindDenied, "permission denied", errors.New("only the admin API is on this socket"))
	}
	uid := info.Peer.UID
	c.actor = "uid:" + strconv.FormatUint(uint64(uid), 10)
	if uid != 0 && int64(uid) != int64(os.Geteuid()) {
		return fail(kindDenied, "permission denied: only root and the CA's own user may use this socket",
			fmt.Errorf("caller has uid %d", uid))
	}
	if err := info.Peer.Elsewhere(); err != nil {
		return fail(kindDenied, "permission denied: root in a container is not root of the CA's machine: "+
			"call from the machine itself, or where the CA is in a container, from within it (docker exec, kubectl exec)", err)
	}
	return nil
}

// newRequestID returns a random name for a request. It is not a secret.
func newRequestID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// growStack makes the goroutine's stack as large as a call needs it. Each call has a
// goroutine of its own, whose stack would be copied three times on the way down.
//
//go:noinline
func growStack() {
	var frame [callStack]byte
	runtime.KeepAlive(&frame)
}

// callStack is somewhat less than the stack of an Issue, in bytes.
const callStack = 12 << 10

func (s *Server) interceptUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	growStack()
	c, err := s.authorize(ctx, info.FullMethod)
	defer func() { err = s.finish(ctx, c, info.FullMethod, recover(), err) }()
	if err != nil {
		s.recordDenied(ctx, c, info.FullMethod, err)
		return nil, err
	}
	if s.takesTwo(info.FullMethod, req) {
		handler = s.hold
	}
	resp, err = handler(context.WithValue(ctx, callerKey{}, c), req)
	if err != nil && changes(info.FullMethod, req) {
		s.recordFailed(ctx, c, info.FullMethod, err)
	}
	return resp, err
}

func (s *Server) interceptStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx := stream.Context()
	c, err := s.authorize(ctx, info.FullMethod)
	defer func() { err = s.finish(ctx, c, info.FullMethod, recover(), err) }()
	if err != nil {
		s.recordDenied(ctx, c, info.FullMethod, err)
		return err
	}
	return handler(srv, &authorizedStream{stream, context.WithValue(ctx, callerKey{}, c)})
}

// changes reports whether a call would change something.
func changes(method string, req any) bool {
	switch method {
	case adminv1.AdminService_ApplyEntries_FullMethodName:
		apply, ok := req.(*adminv1.ApplyEntriesRequest)
		return ok && !apply.GetDryRun()
	case adminv1.AdminService_DeleteEntries_FullMethodName,
		adminv1.AdminService_CreateToken_FullMethodName,
		adminv1.AdminService_DeleteToken_FullMethodName,
		adminv1.AdminService_EvictNode_FullMethodName,
		adminv1.AdminService_BanNode_FullMethodName,
		adminv1.AdminService_UnbanNode_FullMethodName,
		adminv1.AdminService_AddQuarantine_FullMethodName,
		adminv1.AdminService_LiftQuarantine_FullMethodName,
		adminv1.AdminService_RotateIntermediate_FullMethodName,
		adminv1.AdminService_ChangeRotation_FullMethodName,
		adminv1.AdminService_ApproveRootChange_FullMethodName,
		adminv1.AdminService_RejectRootChange_FullMethodName,
		adminv1.AdminService_RenewSVIDs_FullMethodName,
		downstreamv1.DownstreamService_Mint_FullMethodName:
		return true
	default:
		return false
	}
}

// recordDenied records a call that authorization has refused, for whom it came
// from as far as that is known.
func (s *Server) recordDenied(ctx context.Context, c *caller, method string, err error) {
	if c.recorded {
		return
	}
	r := s.callRecord(c, method, err)
	r.Detail = truncate(err.Error())
	source, foreign := host(c.address), true
	switch {
	case c.denied != nil:
		source, foreign = c.denied.ID, false
		r.Node = nodeRef(c.denied, c.address)
	case c.actor != "":
		source = c.actor
	}
	s.recordRefusal(ctx, source, foreign, r)
}

// recordFailed records a change that was asked for and not made. What was wrong
// with the request is not repeated, since it quotes the request, in which a person
// may have put anything: the caller was told.
func (s *Server) recordFailed(ctx context.Context, c *caller, method string, err error) {
	if c.recorded {
		return
	}
	r := s.callRecord(c, method, err)
	r.Detail = "nothing was changed"
	if r.GetOutcome() == ledgerv1.Outcome_OUTCOME_ERROR {
		r.Detail = "it was not done, or not completely: the log says why"
	}
	s.recordRefusal(ctx, c.actor, true, r)
}

// callRecord returns the record of a call that failed with err.
func (s *Server) callRecord(c *caller, method string, err error) *ledgerv1.Record {
	r := s.newRecord(c, ledgerv1.Event_EVENT_CALL_REFUSED)
	code := statusOf(err, c.requestID).Code()
	r.Outcome, r.Reason = ledgerv1.Outcome_OUTCOME_REFUSED, failureLabel(code)
	if code == codes.Unavailable || code == codes.Internal {
		r.Outcome = ledgerv1.Outcome_OUTCOME_ERROR
	}
	r.Call = method[strings.LastIndexByte(method, '/')+1:]
	if _, known := methods[method]; !known {
		r.Call = "unknown"
	}
	if c.address != "" {
		r.Node = &ledgerv1.NodeRef{Address: c.address}
	}
	return r
}

// authorizedStream is a stream whose context names the caller.
type authorizedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // grpc.ServerStream is an interface with a Context method
}

func (s *authorizedStream) Context() context.Context { return s.ctx }

// finish logs what a call came to and returns what goes out.
func (s *Server) finish(ctx context.Context, c *caller, method string, panicked any, err error) error {
	if panicked != nil {
		s.metrics.panics.Inc()
		s.log.ErrorContext(ctx, "handler panicked", "method", method, "request_id", c.requestID,
			"err", fmt.Sprint(panicked), "stack", string(debug.Stack()))
		err = fail(kindInternal, "internal error", nil)
	}
	if err == nil {
		return nil
	}
	st := statusOf(err, c.requestID)
	s.metrics.rpcFailures.WithLabelValues(failureLabel(st.Code())).Inc()
	attrs := []any{"method", method, "request_id", c.requestID, "address", c.address, "code", st.Code().String(), "err", err}
	if c.node != nil {
		attrs = append(attrs, "node_id", c.node.ID)
	}
	if c.actor != "" {
		attrs = append(attrs, "actor", c.actor)
	}
	switch st.Code() {
	case codes.Internal:
		s.log.ErrorContext(ctx, "call failed", attrs...)
	default:
		s.log.DebugContext(ctx, "call refused", attrs...)
	}
	return st.Err()
}

// failureLabel keeps the metric's label a closed set.
func failureLabel(c codes.Code) string {
	switch c {
	case codes.InvalidArgument:
		return "invalid"
	case codes.NotFound:
		return "not_found"
	case codes.FailedPrecondition:
		return "conflict"
	case codes.PermissionDenied:
		return "denied"
	case codes.Unauthenticated:
		return "unauthenticated"
	case codes.ResourceExhausted:
		return "overload"
	case codes.Unavailable:
		return "unavailable"
	case codes.Canceled, codes.DeadlineExceeded:
		return "canceled"
	default:
		return "internal"
	}
}

// host returns the address without its port.
func host(address string) string {
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return h
}

// refuseUnknown answers calls of services and methods that do not exist. It is
// behind the same gate, which refuses them.
func refuseUnknown(any, grpc.ServerStream) error {
	return status.Error(codes.Unimplemented, "unknown method")
}
