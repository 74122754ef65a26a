package export

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/meshid/meshid/internal/backoff"
)

const (
	answerBytes = 64 << 10  // of an answer that are read
	maxWait     = time.Hour // that a receiver may ask for
)

// Poster sends requests to one URL, and keeps to what the receiver asks for. It is
// used by one goroutine.
type Poster struct {
	url         *url.URL
	tls         TLS
	headersFile string
	wait        time.Time // the receiver wants nothing before
}

// NewPoster checks the settings: an address that is not this machine's is reached
// over HTTPS. Its errors are *SettingErrors; setting is the name of that of the
// address.
func NewPoster(setting, address string, t TLS, headersFile string) (*Poster, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, Bad(setting, "%q is no URL: write https://host/path", address)
	}
	if u.User != nil {
		return nil, Bad(setting, "a secret is in the URL: put it in a file")
	}
	if u.Scheme == "http" && !loopback(u.Hostname()) {
		return nil, Bad(setting, "%s is not on this machine: write https://", u.Host)
	}
	p := &Poster{url: u, tls: t, headersFile: headersFile}
	if _, err := t.Config(u.Hostname()); err != nil {
		return nil, err
	}
	if _, err := p.Headers(); err != nil {
		return nil, err
	}
	return p, nil
}

// loopback says whether a host is certainly this machine.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// URL is where the requests go; it belongs to p.
func (p *Poster) URL() *url.URL { return p.url }

// TLS is how connections are made.
func (p *Poster) TLS() TLS { return p.tls }

// Headers reads the file of further headers, of which each line is "name: value".
func (p *Poster) Headers() (http.Header, error) {
	h := make(http.Header)
	if p.headersFile == "" {
		return h, nil
	}
	text, err := readSecret("headers_file", p.headersFile)
	if err != nil {
		return nil, err
	}
	for i, line := range strings.Split(string(text), "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		value = textproto.TrimString(value)
		if !ok || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return nil, Bad("headers_file", "line %d of %s is no header: write name: value", i+1, p.headersFile)
		}
		h.Add(name, value)
	}
	return h, nil
}

// Wait returns when the receiver wants more.
func (p *Poster) Wait(ctx context.Context) error {
	wait := time.Until(p.wait)
	if wait <= 0 {
		return nil
	}
	if err := backoff.Wait(ctx, wait); err != nil {
		return fmt.Errorf("the receiver asked to wait until %s", p.wait.UTC().Format(time.RFC3339))
	}
	return nil
}

// Delay notes that the receiver wants nothing for d.
func (p *Poster) Delay(d time.Duration) { p.wait = time.Now().Add(min(d, maxWait)) }

// Post sends a request and returns the answer's body, if the answer is a success. A
// redirection is none: records go nowhere that the operator did not write.
func (p *Poster) Post(ctx context.Context, header http.Header, body []byte) ([]byte, error) {
	if err := p.Wait(ctx); err != nil {
		return nil, err
	}
	c, err := p.tls.Config(p.url.Hostname())
	if err != nil {
		return nil, err
	}
	more, err := p.Headers()
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header = header
	maps.Copy(request.Header, more)
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: c, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close() //nolint:errcheck // only read from
	text, err := io.ReadAll(io.LimitReader(answer.Body, answerBytes))
	if err != nil {
		return nil, err
	}
	switch code := answer.StatusCode; {
	case code >= 200 && code < 300:
		return text, nil
	case code >= 300 && code < 400:
		return nil, fmt.Errorf("the receiver answers %s to %s: write the address where it is", answer.Status, strconv.Quote(Clip(answer.Header.Get("Location"), clipName)))
	default:
		if d, ok := retryAfter(answer.Header.Get("Retry-After"), time.Now()); ok && (code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable) {
			p.Delay(d)
		}
		return nil, fmt.Errorf("the receiver answers %s: %s", answer.Status, strconv.Quote(Clip(strings.TrimSpace(string(text)), clipName)))
	}
}

// retryAfter reads a Retry-After header (RFC 9110 §10.2.3): seconds, or a date.
func retryAfter(value string, now time.Time) (time.Duration, bool) {
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, true
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(at.Sub(now), 0), true
	}
	return 0, false
}
