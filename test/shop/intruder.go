package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// attempt is one way in that the intruder tries again and again.
type attempt struct {
	Name    string `json:"name"`
	Tries   uint64 `json:"tries"`
	GotIn   uint64 `json:"got_in"`
	Refusal string `json:"refusal"` // why the last one was refused

	try func(context.Context) error // nil means: it got in
}

// intrude tries its doors once a second: its own sidecar, if it has one, and for
// each address of a service plain HTTP, TLS without a certificate, and TLS with
// a certificate it made itself, which claims to be somebody who is allowed.
func intrude(ctx context.Context, sidecar, claim, stats string, addresses []string, logger *slog.Logger) error {
	forged, err := forge(claim)
	if err != nil {
		return err
	}
	l, err := listenUnix(ctx, stats)
	if err != nil {
		return err
	}
	var attempts []*attempt
	if sidecar != "" {
		client := newClient()
		attempts = append(attempts, &attempt{Name: "through its own sidecar", try: func(ctx context.Context) error {
			_, err := ask(ctx, client, sidecar)
			return err
		}})
	}
	for _, address := range addresses {
		attempts = append(attempts,
			&attempt{Name: "plain HTTP to " + address, try: knock(address, nil)},
			&attempt{Name: "TLS without a certificate to " + address, try: knock(address, &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true})},                                              //nolint:gosec // an intruder does not care who answers
			&attempt{Name: "TLS with a forged certificate to " + address, try: knock(address, &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, Certificates: []tls.Certificate{forged}})}, //nolint:gosec // an intruder does not care who answers
		)
	}
	var mu sync.Mutex // guards the counters of attempts
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			for _, a := range attempts {
				err := a.try(ctx)
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				a.Tries++
				if err == nil {
					a.GotIn++
					logger.ErrorContext(ctx, "intruder got in", "method", a.Name)
				} else {
					a.Refusal = err.Error()
				}
				mu.Unlock()
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	err = serveUntil(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		_ = json.NewEncoder(w).Encode(attempts) // the caller is gone if it fails
	}))
	wg.Wait()
	return err
}

// knock returns a try that asks the service at an address directly. In TLS 1.3
// the client's handshake is over before the server has judged its certificate,
// so only an HTTP answer means that it got in.
func knock(address string, config *tls.Config) func(context.Context) error {
	scheme := "http"
	if config != nil {
		scheme = "https"
	}
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	return func(ctx context.Context) error {
		_, err := ask(ctx, client, scheme+"://"+address+"/")
		return err
	}
}

// forge makes a self-signed certificate that claims a SPIFFE ID.
func forge(claim string) (tls.Certificate, error) {
	id, err := url.Parse(claim)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("SHOP_CLAIM: %w", err)
	}
	if id.Scheme != "spiffe" {
		return tls.Certificate{}, errors.New("SHOP_CLAIM is not a SPIFFE ID")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(240 * time.Hour),
		URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
