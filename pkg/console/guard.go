package console

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	prefix    = "/console"
	loginPath = prefix + "/login"
)

// policy is that of every answer: nothing but our own files, no inline script or
// style, nobody frames it, and no script can make markup of text.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"form-action 'self'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'"

// guard is the gate of every request, in this order:
//
//  1. the answer gets its headers, whatever it will be
//  2. the name that the browser asked for is one of ours
//  3. what it sends is bounded
//  4. a form that another site sends is refused
//  5. there is a place for it
func (c *Console) guard(next http.Handler) http.Handler {
	next = http.NewCrossOriginProtection().Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
		h.Set("Cache-Control", "no-store")
		if c.cfg.Strict {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		if !c.names[canonical(r.Host)] {
			http.Error(w, "this console does not answer to that name: add it to console.names of the CA's configuration", http.StatusMisdirectedRequest)
			return
		}
		if len(r.RequestURI) > maxURLBytes {
			http.Error(w, "the address is too long", http.StatusRequestURITooLong)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBodyBytes)
		if r.URL.Path != prefix+"/events" { // streams are counted by themselves
			select {
			case c.places <- struct{}{}:
				defer func() { <-c.places }()
			default:
				h.Set("Retry-After", "1")
				http.Error(w, "too many requests at the same time: try again", http.StatusServiceUnavailable)
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), 2*queryTimeout)
			defer cancel()
			r = r.WithContext(ctx)
		}
		next.ServeHTTP(w, r)
	})
}

// canonical is a host's name without port, as it is compared.
func canonical(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
}

// redirect sends the browser to a path of ours.
func redirect(w http.ResponseWriter, r *http.Request, path string) {
	http.Redirect(w, r, local(path), http.StatusSeeOther) //nolint:gosec // G710: local lets no other site pass
}

// local returns path if it is one of the console's pages, else its first page:
// what a browser brings back is never a way to another site.
func local(path string) string {
	if len(path) > maxURLBytes || !strings.HasPrefix(path, prefix+"/") || strings.HasPrefix(path, loginPath) ||
		strings.HasPrefix(path, prefix+"/events") || strings.Contains(path, "//") || strings.ContainsFunc(path, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '\\'
	}) {
		return prefix + "/"
	}
	return path
}

// Attempts to log in from one address, and how many addresses are remembered.
const (
	maxTries     = 20
	triesPer     = time.Minute
	maxAddresses = 4096
)

// tries bounds the attempts to log in. When too many addresses come at once, all
// that are new share one place.
type tries struct {
	mu    sync.Mutex // guards what follows
	began time.Time
	count map[string]int
}

func newTries() *tries { return &tries{count: make(map[string]int)} }

// take reports whether address may try again now.
func (t *tries) take(address string, now time.Time) bool {
	if host, _, err := net.SplitHostPort(address); err == nil {
		address = host
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.began) >= triesPer || now.Before(t.began) {
		t.began = now
		clear(t.count)
	}
	if _, known := t.count[address]; !known && len(t.count) >= maxAddresses {
		address = "others"
	}
	t.count[address]++
	return t.count[address] <= maxTries
}

// tooMany refuses a further attempt.
func tooMany(w http.ResponseWriter) {
	w.Header().Set("Retry-After", fmt.Sprint(int(triesPer/time.Second)))
	http.Error(w, "too many attempts to sign in: wait a minute", http.StatusTooManyRequests)
}
