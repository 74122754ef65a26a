package server

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/identity"
)

// kind is what a caller is told of an error.
type kind int

const (
	kindInternal kind = iota
	// kindInvalid: the request is wrong; text says how.
	kindInvalid
	// kindNotFound: text says what.
	kindNotFound
	// kindConflict: the request does not fit the present state; text says how.
	kindConflict
	// kindDenied: not for this caller, now or later.
	kindDenied
	// kindUnauthenticated: the caller's X.509-SVID is not accepted (any more);
	// an agent attests again.
	kindUnauthenticated
	// kindOverload: too much at once; try again later.
	kindOverload
	// kindUnavailable: not now; try again.
	kindUnavailable
)

// failure is an error with what the caller may know of it. cause and detail
// stay inside.
type failure struct {
	kind  kind
	text  string // for the caller; fixed, or about the caller's own request
	cause error  // for the log
	// entries are what is wrong with the entries of a request.
	entries []*identity.EntryError
}

func (f *failure) Error() string {
	if f.cause == nil {
		return f.text
	}
	return fmt.Sprintf("%s: %v", f.text, f.cause)
}

func (f *failure) Unwrap() error { return f.cause }

func fail(k kind, text string, cause error) *failure {
	return &failure{kind: k, text: text, cause: cause}
}

// maxViolations bounds what is told of a request's mistakes, which travel in its
// trailers.
const maxViolations = 100

// statusOf maps an error to what goes out: the kind's code, a text that names no
// inner part, and the request's id, under which the log and the ledger have the
// rest. It is the only place where codes are chosen.
func statusOf(err error, requestID string) *status.Status {
	if st, ok := status.FromError(err); ok && !isFailure(err) {
		return st // gRPC's own, such as an ended stream
	}
	var f *failure
	if !errors.As(err, &f) {
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			f = fail(kindUnavailable, "it took too long", err)
		case errors.Is(err, context.Canceled):
			return status.New(codes.Canceled, "canceled")
		default:
			f = fail(kindInternal, "internal error", err)
		}
	}
	st := status.New(f.kind.code(), fmt.Sprintf("%s (request %s)", f.text, requestID))
	if len(f.entries) == 0 {
		return st
	}
	bad := new(errdetails.BadRequest)
	for _, e := range f.entries {
		for _, field := range e.Fields {
			if len(bad.FieldViolations) == maxViolations {
				break
			}
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field:       violationField(e.Entry, field),
				Description: violationText(field),
			})
		}
	}
	detailed, err := st.WithDetails(bad)
	if err != nil {
		return st
	}
	return detailed
}

func isFailure(err error) bool {
	var f *failure
	return errors.As(err, &f)
}

func (k kind) code() codes.Code {
	switch k {
	case kindInvalid:
		return codes.InvalidArgument
	case kindNotFound:
		return codes.NotFound
	case kindConflict:
		return codes.FailedPrecondition
	case kindDenied:
		return codes.PermissionDenied
	case kindUnauthenticated:
		return codes.Unauthenticated
	case kindOverload:
		return codes.ResourceExhausted
	case kindUnavailable:
		return codes.Unavailable
	case kindInternal:
		return codes.Internal
	default:
		return codes.Internal
	}
}

// violationField names a field of an entry as "entry.field:line:column"; line
// and column are left out where there are none.
func violationField(entry string, f identity.FieldError) string {
	entry = truncate(entry) // it may be what is wrong
	if f.Line == 0 {
		return entry + "." + f.Field
	}
	return fmt.Sprintf("%s.%s:%d:%d", entry, f.Field, f.Line, f.Column)
}

func violationText(f identity.FieldError) string {
	if f.Hint == "" {
		return f.Message
	}
	return f.Message + ": " + f.Hint
}
