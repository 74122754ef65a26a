package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Kinds of errors, for errors.Is.
var (
	// ErrDenied: the credentials are not accepted, or do not allow the call.
	ErrDenied = errors.New("denied")
	// ErrNotFound: there is no such object, or the server does not have the resource.
	ErrNotFound = errors.New("not found")
	// ErrExists: an object of that name is there already.
	ErrExists = errors.New("exists already")
	// ErrConflict: the object has changed since it was read.
	ErrConflict = errors.New("conflict")
	// ErrInvalid: the server does not accept the request as it is, now or later.
	ErrInvalid = errors.New("invalid")
	// ErrLimited: the server has too much to do; Error.RetryAfter says when to come back.
	ErrLimited = errors.New("rate limited")
	// ErrUnavailable: no answer, or none that means anything; it may be tried again.
	ErrUnavailable = errors.New("unavailable")
)

// Error is a call that did not succeed.
type Error struct {
	// Kind is one of the above.
	Kind error
	// RetryAfter is how long the server wants to be left alone; 0 if it did not say.
	RetryAfter time.Duration

	cluster, verb, path string
	cause               error
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s %s in cluster %s: %v", e.verb, e.path, e.cluster, e.cause)
}

// Unwrap returns the kind and the cause.
func (e *Error) Unwrap() []error { return []error{e.Kind, e.cause} }

// failed makes an error of what went wrong; nil of nil. Others are what else is known
// of the same call.
func (c *Client) failed(verb string, p Path, err error, others ...error) error {
	if err == nil {
		return nil
	}
	e := &Error{Kind: kind(err), cluster: c.name, verb: verb, path: p.String(), cause: err}
	for _, err := range append(others, err) {
		if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
			e.RetryAfter = max(e.RetryAfter, time.Duration(seconds)*time.Second)
		}
	}
	return e
}

func kind(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return ErrUnavailable
	case apierrors.IsUnauthorized(err), apierrors.IsForbidden(err):
		return ErrDenied
	case apierrors.IsNotFound(err):
		return ErrNotFound
	case apierrors.IsAlreadyExists(err):
		return ErrExists
	case apierrors.IsConflict(err):
		return ErrConflict
	case apierrors.IsTooManyRequests(err):
		return ErrLimited
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsMethodNotSupported(err),
		apierrors.IsNotAcceptable(err), apierrors.IsUnsupportedMediaType(err), apierrors.IsRequestEntityTooLargeError(err):
		return ErrInvalid
	default:
		return ErrUnavailable
	}
}
