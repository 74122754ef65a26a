package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// answer is what a service says; each one passes on what its upstream said.
type answer struct {
	Service  string  `json:"service"`
	Instance string  `json:"instance"`
	Caller   string  `json:"caller"`
	Upstream *answer `json:"upstream,omitempty"`
}

const (
	listenAddress = "127.0.0.1:8080" // only the sidecar reaches it
	requestTime   = 10 * time.Second
	maxAnswer     = 64 << 10
)

// serve answers until ctx ends. Once it does, there is a socket at ready.
func serve(ctx context.Context, service, instance, upstream, ready string) error {
	client := newClient()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &answer{Service: service, Instance: instance, Caller: caller(r.Header.Get("X-Forwarded-Client-Cert"))}
		if upstream != "" {
			var err error
			if a.Upstream, err = ask(r.Context(), client, upstream); err != nil {
				http.Error(w, service+": "+err.Error(), http.StatusBadGateway)
				return
			}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a) // the caller is gone if it fails
	})
	var l net.ListenConfig
	listener, err := l.Listen(ctx, "tcp", listenAddress)
	if err != nil {
		return err
	}
	sign, err := listenUnix(ctx, ready)
	if err != nil {
		return err
	}
	return errors.Join(serveUntil(ctx, listener, handler), sign.Close())
}

// serveUntil serves until ctx ends, and then finishes the open requests.
func serveUntil(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Hour}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	if err := s.Shutdown(grace); err != nil {
		return err
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func newClient() *http.Client {
	return &http.Client{Timeout: requestTime, Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second}}
}

// ask sends one request and returns the answer.
func ask(ctx context.Context, client *http.Client, url string) (*answer, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil) //nolint:gosec // the address is the harness's
	if err != nil {
		return nil, err
	}
	res, err := client.Do(r) //nolint:gosec // the address is the harness's
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", res.Status, strings.TrimSpace(string(body)))
	}
	a := new(answer)
	if err := json.Unmarshal(body, a); err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	return a, nil
}

// caller returns the SPIFFE ID in X-Forwarded-Client-Cert, or "".
func caller(xfcc string) string {
	for field := range strings.SplitSeq(xfcc, ";") {
		if id, ok := strings.CutPrefix(field, "URI="); ok {
			return strings.Trim(id, `"`)
		}
	}
	return ""
}
