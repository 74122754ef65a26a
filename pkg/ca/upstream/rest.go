package upstream

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// maxAnswer bounds the body of an answer.
const maxAnswer = 1 << 20

// REST makes calls to CAs that speak JSON over HTTPS. It may be used concurrently.
type REST struct {
	// Client is used for all calls. Redirects are not followed: what authenticates us
	// is for the configured address only.
	Client *http.Client
	// Name says who is called, in errors.
	Name string
	// Said reads the message out of the body of an error; nil to take none.
	Said func(body []byte) string
}

// StatusError is an answer whose status says that the call failed.
type StatusError struct {
	// Code is the HTTP status, and Said what the body says of it.
	Code       int
	Said       string
	name, path string
}

// Error says who answered what.
func (e *StatusError) Error() string {
	return fmt.Sprintf("%s answers %s with status %d: %q", e.name, e.path, e.Code, e.Said)
}

// Call sends in as JSON, or nothing if it is nil, and decodes the answer into out,
// if that is not nil. Errors are as those of CA.Mint; they wrap a *StatusError if
// there was an answer, and Stale says whether there was none for the connection's sake.
func (c *REST) Call(ctx context.Context, method, address string, header http.Header, in, out any) error {
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode the request to %s: %w", c.Name, err)
		}
		body = bytes.NewReader(encoded)
	}
	r, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return fmt.Errorf("make a request to %s: %w", c.Name, err)
	}
	if in != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	maps.Copy(r.Header, header)
	var reused atomic.Bool
	r = r.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { reused.Store(got.Reused) }}))
	lost := func(doing string, err error) error {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %s %s: %w", ErrUnavailable, doing, c.Name, context.Cause(ctx))
		}
		if reused.Load() {
			err = fmt.Errorf("%w: %w", errStale, err)
		}
		return fmt.Errorf("%w: %s %s: %w", ErrUnavailable, doing, c.Name, err)
	}
	client := *c.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	answer, err := client.Do(r)
	if err != nil {
		return lost("ask", err)
	}
	defer func() { _ = answer.Body.Close() }() // it was read
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	switch {
	case err != nil:
		return lost("read the answer of", err)
	case len(data) > maxAnswer:
		return fmt.Errorf("the answer of %s has more than %d bytes", c.Name, maxAnswer)
	case answer.StatusCode/100 != 2:
		return c.refused(answer, data)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("the answer of %s to %s is not the JSON that was expected", c.Name, r.URL.Path)
	}
	return nil
}

// refused gives an answer its kind.
func (c *REST) refused(answer *http.Response, body []byte) error {
	text := ""
	if c.Said != nil {
		text = c.Said(body)
	}
	err := &StatusError{Code: answer.StatusCode, Said: Cut(text), name: c.Name, path: answer.Request.URL.Path}
	switch code := answer.StatusCode; {
	case code == http.StatusTooManyRequests:
		return &RateLimitError{RetryAfter: retryAfter(answer.Header.Get("Retry-After"), time.Now()), Err: err}
	case code/100 == 3:
		return fmt.Errorf("%w (it redirects, which is not followed: configure the address of the active server)", err)
	case code == http.StatusRequestTimeout, code/100 == 5:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case code/100 == 4:
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return err
}

// retryAfter reads the header of RFC 9110 §10.2.3; 0 if there is none.
func retryAfter(value string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}

// Client returns a client for one server, which shows pair if that is not nil. The
// server's certificate must be issued by a CA in the PEM file serverCA, or by one of
// the system's if serverCA is empty. done ends its connections.
func Client(serverCA string, pair *tls.Certificate) (client *http.Client, done func(), err error) {
	trusted, err := readServerCA(serverCA)
	if err != nil {
		return nil, nil, err
	}
	transport := newTransport(trusted, pair)
	return &http.Client{Transport: transport}, transport.CloseIdleConnections, nil
}

// Arrange makes an answer of an intermediate and the certificates that a CA named
// beside it, in any order: those that sign themselves are its roots, and of the
// others those that lead to one are the chain. What leads nowhere is left for
// Request.Verify to refuse.
func Arrange(signed *x509.Certificate, others []*x509.Certificate) *Minted {
	m := &Minted{Chain: []*x509.Certificate{signed}}
	var rest []*x509.Certificate
	for _, c := range others {
		switch {
		case c.Equal(signed):
		case bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil:
			m.Roots = append(m.Roots, c)
		default:
			rest = append(rest, c)
		}
	}
	issues := func(c *x509.Certificate) bool {
		last := m.Chain[len(m.Chain)-1]
		return bytes.Equal(c.RawSubject, last.RawIssuer) && last.CheckSignatureFrom(c) == nil
	}
	for !slices.ContainsFunc(m.Roots, issues) {
		i := slices.IndexFunc(rest, issues)
		if i < 0 {
			break
		}
		m.Chain = append(m.Chain, rest[i])
		rest = slices.Delete(rest, i, i+1)
	}
	return m
}

// ParseAddress reads the address of a server, which is https://host[:port], and a path if
// one may be there. It returns false if the text is anything else, such as an address with
// a password, with a query, or of another scheme.
func ParseAddress(text string, path bool) (*url.URL, bool) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return nil, false
	}
	if strings.Trim(u.Path, "/") == "" {
		u.Path = ""
	}
	return u, path || u.Path == ""
}

// ParseChain reads PEM certificates in the order in which they stand, most at the
// most, each of a size that is accepted.
func ParseChain(most int, texts ...string) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, text := range texts {
		for rest := []byte(text); len(bytes.TrimSpace(rest)) > 0; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
				return nil, errors.New("there is something that is no PEM certificate")
			}
			if len(all) == most {
				return nil, fmt.Errorf("more than %d certificates", most)
			}
			if len(block.Bytes) > MaxCertificate {
				return nil, fmt.Errorf("certificate %d has %d bytes: at most %d are accepted", len(all)+1, len(block.Bytes), MaxCertificate)
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
			}
			all = append(all, c)
		}
	}
	return all, nil
}
