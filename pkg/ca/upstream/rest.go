package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxAnswer bounds the body of an answer, and maxSaid what of an error is passed on.
	maxAnswer, maxSaid = 1 << 20, 500
)

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

// Call sends in as JSON, or nothing if it is nil, and decodes the answer into out,
// if that is not nil. Errors are as those of CA.Mint.
func (c *REST) Call(ctx context.Context, method, url string, header http.Header, in, out any) error {
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode the request to %s: %w", c.Name, err)
		}
		body = bytes.NewReader(encoded)
	}
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return fmt.Errorf("make a request to %s: %w", c.Name, err)
	}
	maps.Copy(r.Header, header)
	if in != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	client := *c.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	answer, err := client.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%w: ask %s: %w", ErrUnavailable, c.Name, err)
	}
	defer func() { _ = answer.Body.Close() }() // it was read
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("%w: read the answer of %s: %w", ErrUnavailable, c.Name, context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("%w: read the answer of %s: %w", ErrUnavailable, c.Name, err)
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
	if len(text) > maxSaid {
		text = strings.ToValidUTF8(text[:maxSaid], "") + "…"
	}
	err := fmt.Errorf("%s answers %s with status %d: %q", c.Name, answer.Request.URL.Path, answer.StatusCode, text)
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
