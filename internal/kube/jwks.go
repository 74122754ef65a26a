package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// maxKeySet and maxKeys bound a cluster's key set, and maxKeyFile what is read
	// beside it.
	maxKeySet  = 1 << 20
	maxKeys    = 64
	maxKeyFile = 1 << 20
	// keysLife is how long keys are used before they are fetched again, so that one
	// that the cluster took out is not believed for longer. If they cannot be fetched,
	// they are used for keysGrace at most.
	keysLife  = 5 * time.Minute
	keysGrace = 24 * time.Hour
	// keysPause is between two fetches for the sake of tokens whose key is unknown:
	// strangers can send any number of them.
	keysPause = 5 * time.Second
	// keysTimeout bounds one fetch.
	keysTimeout = 5 * time.Second
)

// signatureAlgorithms are those that clusters sign with. None is symmetric.
var signatureAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512}

// KeysConfig says where the keys are that a cluster signs its tokens with.
type KeysConfig struct {
	// Issuer is the claim iss of the cluster's tokens (--service-account-issuer).
	Issuer string
	// File is a JSON Web Key Set, as `kubectl get --raw /openid/v1/jwks` prints it. It
	// is read again when it has changed.
	File string
	// URL is where the key set is, instead: https. It is fetched again when a token is
	// signed with a key that is not in it.
	URL string
	// CA is a PEM file with the CAs of the URL's certificate, read again at each fetch;
	// empty for those of the system.
	CA string
	// TokenFile has what is shown to who serves the URL, read again at each fetch;
	// empty for nothing.
	TokenFile string
}

// Keys verifies tokens of a cluster offline, by the keys that it signs with. It needs no
// right in the cluster. That a token's pod was deleted it does not know.
type Keys struct {
	config KeysConfig

	mu      sync.Mutex // guards what follows
	keys    map[string]jose.JSONWebKey
	read    time.Time   // when keys were read or fetched
	tried   time.Time   // when they were last tried to be
	stamp   os.FileInfo // of the file that was read
	fetched chan struct{}
	err     error // of the last fetch
}

// NewKeys returns a TokenVerifier by a cluster's keys. The file must be there; a URL
// need not answer yet.
func NewKeys(c KeysConfig) (*Keys, error) {
	switch {
	case c.Issuer == "":
		return nil, errors.New("issuer is missing: `kubectl get --raw /.well-known/openid-configuration` says it")
	case (c.File == "") == (c.URL == ""):
		return nil, errors.New("write either the file or the url of the key set")
	case c.URL == "" && (c.CA != "" || c.TokenFile != ""):
		return nil, errors.New("ca and token_file are for a url")
	}
	k := &Keys{config: c}
	if c.URL != "" {
		if u, err := url.Parse(c.URL); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
			return nil, fmt.Errorf("%.200q is no URL of a key set: write https://HOST/openid/v1/jwks", c.URL)
		}
		return k, nil
	}
	_, err := k.fromFile()
	return k, err
}

// Verify implements TokenVerifier.
func (k *Keys) Verify(ctx context.Context, token, audience string) (*TokenIdentity, error) {
	c, err := readClaims(token, audience, time.Now())
	if err != nil {
		return nil, err
	}
	if c.Issuer != k.config.Issuer {
		return nil, refuse("is of issuer %.200q, want %q", c.Issuer, k.config.Issuer)
	}
	signed, err := jose.ParseSignedCompact(token, signatureAlgorithms)
	if err != nil {
		return nil, refuse("is not signed as clusters sign")
	}
	header := signed.Signatures[0].Header
	key, err := k.key(ctx, header.KeyID)
	if err != nil {
		return nil, err
	}
	if key.Algorithm != "" && key.Algorithm != header.Algorithm {
		return nil, refuse("is signed by %.20q with a key for %.20q", header.Algorithm, key.Algorithm)
	}
	if _, err := signed.Verify(key.Key); err != nil {
		return nil, refuse("its signature is not the cluster's")
	}
	return c.identity(), nil
}

// key returns the key of that name.
func (k *Keys) key(ctx context.Context, id string) (*jose.JSONWebKey, error) {
	if id == "" {
		return nil, refuse("does not say which key it is signed with")
	}
	keys, err := k.current(ctx, id)
	if err != nil {
		return nil, err
	}
	key, ok := keys[id]
	if !ok {
		return nil, refuse("is signed with a key that the cluster does not have")
	}
	return &key, nil
}

// current returns the keys as they are now. If id is not among those at hand, they are
// fetched first.
func (k *Keys) current(ctx context.Context, id string) (map[string]jose.JSONWebKey, error) {
	if k.config.File != "" {
		return k.fromFile()
	}
	for {
		now := time.Now()
		k.mu.Lock()
		_, known := k.keys[id]
		age := now.Sub(k.read)
		fresh := k.keys != nil && age < keysLife
		switch {
		case fresh && known, now.Sub(k.tried) < keysPause && k.fetched == nil:
			// Nothing newer is to be had at the moment.
			keys, err := k.keys, k.err
			k.mu.Unlock()
			if keys == nil || age >= keysGrace {
				return nil, fmt.Errorf("the cluster's keys cannot be fetched: %w", err)
			}
			if !known && err != nil {
				return nil, fmt.Errorf("a key of the cluster is not known yet, and cannot be fetched: %w", err)
			}
			return keys, nil
		case k.fetched == nil:
			// One fetches for all, also if he himself may not wait so long: who gives up
			// soon must not keep the others from it.
			k.fetched = make(chan struct{})
			k.mu.Unlock()
			k.fetch(context.WithoutCancel(ctx))
			continue
		}
		fetched := k.fetched
		k.mu.Unlock()
		select {
		case <-fetched:
		case <-ctx.Done():
			return nil, fmt.Errorf("fetch the cluster's keys: %w", ctx.Err())
		}
	}
}

// fetch fetches the keys, within keysTimeout, and tells those who wait for it.
func (k *Keys) fetch(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, keysTimeout)
	defer cancel()
	keys, err := k.fromURL(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tried, k.err = time.Now(), err
	if err == nil {
		k.keys, k.read = keys, k.tried
	}
	close(k.fetched)
	k.fetched = nil
}

func (k *Keys) fromURL(ctx context.Context) (map[string]jose.JSONWebKey, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if k.config.CA != "" {
		pem, err := readBounded(k.config.CA, maxKeyFile)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", k.config.CA)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.config.URL, nil)
	if err != nil {
		return nil, err
	}
	if k.config.TokenFile != "" {
		token, err := readBounded(k.config.TokenFile, maxKeyFile)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	transport := &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // nothing was written
	if resp.StatusCode != http.StatusOK {
		hint := ""
		if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
			hint = ": bind the ClusterRole system:service-account-issuer-discovery to who asks, or save the key set as a file"
		}
		return nil, fmt.Errorf("%s answers %s%s", k.config.URL, resp.Status, hint)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySet+1))
	if err != nil {
		return nil, err
	}
	return parseKeys(data)
}

// fromFile returns the keys in the file as it is now. A file that cannot be used is an
// error: whoever took a key out of it must not be misled.
func (k *Keys) fromFile() (map[string]jose.JSONWebKey, error) {
	st, err := os.Stat(k.config.File)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stamp != nil && os.SameFile(st, k.stamp) && st.ModTime().Equal(k.stamp.ModTime()) && st.Size() == k.stamp.Size() {
		return k.keys, nil
	}
	data, err := readBounded(k.config.File, maxKeySet)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.config.File, err)
	}
	k.keys, k.stamp = keys, st
	return keys, nil
}

// parseKeys reads a JSON Web Key Set. Keys of kinds that are not used here are passed
// over; a private one is a mistake that must not pass.
func parseKeys(data []byte) (map[string]jose.JSONWebKey, error) {
	if len(data) > maxKeySet {
		return nil, fmt.Errorf("the key set has more than %d bytes", maxKeySet)
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(bytes.TrimSpace(data), &set); err != nil {
		return nil, fmt.Errorf("is no JSON Web Key Set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the key set has %d keys, at most %d are allowed", len(set.Keys), maxKeys)
	}
	keys := make(map[string]jose.JSONWebKey)
	for _, key := range set.Keys {
		if !key.IsPublic() {
			return nil, fmt.Errorf("key %.100q of the key set is private", key.KeyID)
		}
		if key.KeyID == "" || key.Use != "" && key.Use != "sig" {
			continue
		}
		switch public := key.Key.(type) {
		case *rsa.PublicKey:
			if public.N.BitLen() < 2048 || public.N.BitLen() > 8192 {
				continue
			}
		case *ecdsa.PublicKey:
		default:
			continue
		}
		if _, twice := keys[key.KeyID]; twice {
			return nil, fmt.Errorf("key %.100q of the key set is there twice", key.KeyID)
		}
		keys[key.KeyID] = key
	}
	if len(keys) == 0 {
		return nil, errors.New("the key set has no key that signs tokens")
	}
	return keys, nil
}

// readBounded reads a file. Its errors do not repeat what is in it.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}
