package agent

// The sealed cache: what the agent needs to serve its workloads again after a
// restart without asking anybody. It is one file in DataDir, encrypted with a
// key that is gone after a reboot or, if the operator gave one, outlives it; it is
// read once, at the start. After a reboot the node is who it was, so that it needs
// no new join token; its workloads have all ended, and their keys with them.

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/internal/sealed"
	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	sealedFile = "agent.sealed"
	// maxSealed bounds the file that is read.
	maxSealed = 256 << 20
	// saveAfter is how long after a change that nobody waits for it is written: an
	// agent that dies meanwhile has what is missing issued again.
	saveAfter = time.Second
	// stateVersion is that of the format; a file of another one is dropped.
	stateVersion = 1
)

// HasCache reports whether an agent has left a sealed cache in its data folder,
// and with it most probably an identity that needs no attestation.
func HasCache(dataDir string) bool {
	_, err := os.Lstat(filepath.Join(dataDir, sealedFile))
	return err == nil
}

// vault is where the sealed cache is kept.
type vault struct {
	path   string
	boot   string // names this boot of the machine
	sealer *sealed.Sealer

	mu sync.Mutex // one write at a time, in the order of what they hold
}

// state is the content of the sealed cache.
type state struct {
	Version     int                 `json:"version"`
	TrustDomain string              `json:"trust_domain"`
	Boot        string              `json:"boot"` // of the machine; the keys of SVIDs are of no other
	Epoch       string              `json:"epoch"`
	Revision    uint64              `json:"revision"`
	Entries     [][]byte            `json:"entries"`
	Node        []byte              `json:"node"`
	Sequence    uint64              `json:"bundle_sequence"`
	Roots       [][]byte            `json:"roots"`
	Lists       []stateList         `json:"revocation_lists,omitempty"`
	Own         *stateKey           `json:"own,omitempty"`
	Chains      map[string][][]byte `json:"chains"` // intermediates, which most SVIDs share
	SVIDs       []stateSVID         `json:"svids"`
}

// stateList is a revocation list.
type stateList struct {
	Issuer []byte `json:"issuer"`
	List   []byte `json:"list"`
}

// stateKey is an X.509-SVID with its key.
type stateKey struct {
	Key     []byte    `json:"key"` // PKCS#8
	Leaf    []byte    `json:"leaf"`
	Chain   string    `json:"chain"` // in state.Chains
	RenewAt time.Time `json:"renew_at"`
}

type stateSVID struct {
	stateKey
	Instance    string   `json:"instance"`
	Digests     [][]byte `json:"digests"`
	Entry       string   `json:"entry"`
	EntryDigest []byte   `json:"entry_digest"`
	DNSNames    []string `json:"dns_names,omitempty"`
	Hint        string   `json:"hint,omitempty"`
}

// openVault finds the sealing key. Without one nothing is written: keys never
// reach a disk in clear.
func (a *Agent) openVault() (*vault, error) {
	boot, err := sealed.BootID()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(a.cfg.DataDir, sealedFile)
	var secret []byte
	var binding string
	if a.cfg.SealingKeyFile != "" {
		secret, err = sealed.FileSecret(a.cfg.SealingKeyFile)
	} else {
		binding = boot
		name, aerr := filepath.Abs(path)
		if aerr != nil {
			return nil, fmt.Errorf("name the sealing key: %w", aerr)
		}
		secret, err = sealed.KeyringSecret("meshid:" + name)
	}
	if err != nil {
		return nil, err
	}
	sealer, err := sealed.New(secret, "agent of "+a.cfg.TrustDomain.Name(), binding)
	if err != nil {
		return nil, err
	}
	return &vault{path: path, boot: boot, sealer: sealer}, nil
}

// load reads the sealed cache. Whatever is wrong with it, the agent starts: it
// then attests the node and begins anew.
func (a *Agent) load(ctx context.Context) {
	v, err := a.openVault()
	if err != nil {
		a.cfg.Health.Set(condSealed, health.Warning, "keys are not kept over a restart: "+err.Error()+
			": set sealing_key_file to a file with at least 16 secret bytes, such as a systemd credential")
		a.log.WarnContext(ctx, "no sealing key, keys are not kept over a restart", "err", err)
		return
	}
	a.vault = v
	box, err := durable.ReadSecret(v.path, maxSealed)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var s *state
	if err == nil {
		s, err = a.unseal(box)
	}
	if err == nil {
		err = a.restore(ctx, s)
	}
	if err != nil {
		if errors.Is(err, sealed.ErrBroken) && a.cfg.SealingKeyFile == "" {
			err = fmt.Errorf("%w: its key was in the kernel's keyring, which a reboot empties: "+
				"set sealing_key_file to a secret that stays, such as a systemd credential", err)
		}
		a.mu.Lock()
		a.dropped = err
		a.mu.Unlock()
		a.log.WarnContext(ctx, "sealed cache is dropped", "err", err)
		if err := durable.Remove(v.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.log.WarnContext(ctx, "sealed cache cannot be removed", "err", err)
		}
	}
}

func (a *Agent) unseal(box []byte) (*state, error) {
	plain, err := a.vault.sealer.Open(box)
	if err != nil {
		return nil, err
	}
	s := &state{}
	if err := json.Unmarshal(plain, s); err != nil {
		return nil, fmt.Errorf("read the sealed cache: %w", err)
	}
	if s.Version != stateVersion || s.TrustDomain != a.cfg.TrustDomain.Name() {
		return nil, fmt.Errorf("sealed cache has version %d and is of trust domain %q", s.Version, s.TrustDomain)
	}
	return s, nil
}

// restore puts into force what a file holds. All of it is checked first; what
// has expired is left out.
func (a *Agent) restore(ctx context.Context, s *state) error {
	now := time.Now()
	bundle := &identity.Bundle{TrustDomain: a.cfg.TrustDomain, Sequence: s.Sequence}
	for _, der := range s.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("restore a root: %w", err)
		}
		bundle.Roots = append(bundle.Roots, root)
	}
	var lists []*nodev1.RevocationList
	for _, l := range s.Lists {
		lists = append(lists, &nodev1.RevocationList{Issuer: l.Issuer, List: l.List})
	}
	// They are kept however long ago the CA was heard of: without them, what was
	// revoked would be believed again.
	if err := parseLists(bundle, lists, now, 0); err != nil {
		return fmt.Errorf("restore revocation lists: %w", err)
	}
	if len(bundle.Roots) == 0 {
		return nil // it was written before the node was attested, or after it was evicted
	}
	node := &attributesv1.Node{}
	if err := proto.Unmarshal(s.Node, node); err != nil {
		return fmt.Errorf("restore the node's attributes: %w", err)
	}
	raw := make(map[string]*entryv1.Entry, len(s.Entries))
	entries := make([]*entryv1.Entry, 0, len(s.Entries))
	for _, b := range s.Entries {
		e := &entryv1.Entry{}
		if err := proto.Unmarshal(b, e); err != nil {
			return fmt.Errorf("restore an entry: %w", err)
		}
		raw[e.GetName()] = e
		entries = append(entries, e)
	}
	own, err := a.restoreOwn(now, s, bundle)
	if err != nil {
		return fmt.Errorf("restore the agent's X.509-SVID: %w", err)
	}
	if s.Boot != a.vault.boot {
		a.log.InfoContext(ctx, "the machine was started anew, keys of workloads are dropped", "count", len(s.SVIDs))
		s.SVIDs = nil
	}
	var records []cache.Restored
	for n := range s.SVIDs {
		r, err := a.restoreSVID(now, s, &s.SVIDs[n], bundle)
		if err != nil {
			return fmt.Errorf("restore an X.509-SVID of %s: %w", s.SVIDs[n].Instance, err)
		}
		if r != nil {
			records = append(records, *r)
		}
	}
	var set *identity.Set
	if s.Epoch != "" {
		set = identity.NewSet(a.compile(ctx, entries, nil)...)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.own, a.bundle, a.node = own, bundle, node
	a.cache.SetBundle(now, bundle)
	a.cache.Restore(now, records)
	if set != nil {
		a.raw, a.entries, a.epoch, a.revision = raw, set, s.Epoch, s.Revision
		a.cache.SetEntries(now, set, nil)
		a.showSkipped()
	}
	a.settle(now)
	a.log.InfoContext(ctx, "restored from the sealed cache", "revision", s.Revision, "count", len(records))
	return nil
}

// parts returns the chain and the key of an X.509-SVID.
func (a *Agent) parts(s *state, k *stateKey) ([][]byte, *ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		return nil, nil, errors.New("key cannot be read")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("key is a %T", parsed)
	}
	return append([][]byte{k.Leaf}, s.Chains[k.Chain]...), key, nil
}

// restoreOwn returns nil if there is none that is good for anything.
func (a *Agent) restoreOwn(now time.Time, s *state, bundle *identity.Bundle) (*ownIdentity, error) {
	if s.Own == nil {
		return nil, nil //nolint:nilnil // there is nothing to restore, and that is no error
	}
	der, key, err := a.parts(s, s.Own)
	if err != nil {
		return nil, err
	}
	own, err := a.verifyOwn(now, der, bundle, key)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // it has expired, or its root has gone: the node is attested again
	}
	own.renewAt = now.Add(max(s.Own.RenewAt.Sub(now.Round(0)), 0))
	return own, nil
}

// restoreSVID returns nil if it has expired.
func (a *Agent) restoreSVID(now time.Time, s *state, k *stateSVID, bundle *identity.Bundle) (*cache.Restored, error) {
	der, key, err := a.parts(s, &k.stateKey)
	if err != nil {
		return nil, err
	}
	chain, err := a.parser.chain(der)
	if err != nil {
		return nil, err
	}
	uri, err := uriSAN(chain[0])
	if err != nil {
		return nil, err
	}
	id, err := identity.ParseID(uri)
	if err != nil {
		return nil, err
	}
	proof, err := a.parser.verify(now, chain, bundle.Roots, expectation{
		key: key, id: exactly(id), dnsNames: k.DNSNames, usage: x509.ExtKeyUsageClientAuth,
	})
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // it has expired, or its root has gone: it is issued again
	}
	r := &cache.Restored{
		Instance: k.Instance, Entry: k.Entry, DNSNames: k.DNSNames,
		SVID: &identity.SVID{ID: id, Chain: a.parser.keep(chain), Proof: proof, Key: key, Hint: k.Hint, Entry: k.Entry, RenewAt: k.RenewAt},
	}
	copy(r.EntryDigest[:], k.EntryDigest)
	for _, d := range k.Digests {
		r.Digests = append(r.Digests, string(d))
	}
	return r, nil
}

// persist writes the sealed cache when something in it has changed, until ctx
// ends, and then once more. It waits before it does, not afterwards: what comes in
// a burst is written once, when the burst is over.
func (a *Agent) persist(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			if err := a.writeNow(context.WithoutCancel(ctx)); err != nil {
				a.log.WarnContext(ctx, "sealed cache is not written", "err", err)
			}
			return nil
		case <-a.save:
		}
		timer := time.NewTimer(saveAfter)
		select {
		case <-ctx.Done():
			timer.Stop()
			continue
		case <-timer.C:
		}
		if err := a.writeNow(ctx); err != nil {
			a.log.WarnContext(ctx, "sealed cache is not written", "err", err)
		}
	}
}

// writeNow writes the sealed cache. That it cannot be written is a condition,
// and no reason to stop serving.
func (a *Agent) writeNow(ctx context.Context) error {
	v := a.vault
	if v == nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s, err := a.snapshot(v.boot)
	if err != nil {
		return err
	}
	plain, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode the sealed cache: %w", err)
	}
	box := v.sealer.Seal(plain)
	clear(plain)
	if err := durable.WriteFile(v.path, box, 0o600); err != nil {
		a.metrics.saved.WithLabelValues(string(failed)).Inc()
		a.cfg.Health.Set(condSealed, health.Warning, "keys are not kept over a restart: "+err.Error())
		a.log.WarnContext(ctx, "sealed cache is not written", "err", err)
		return nil
	}
	a.metrics.saved.WithLabelValues(string(succeeded)).Inc()
	a.cfg.Health.Clear(condSealed)
	return nil
}

// snapshot collects what is to be kept in this boot.
func (a *Agent) snapshot(boot string) (*state, error) {
	a.mu.Lock()
	records := a.cache.Export()
	own, bundle, node := a.own, a.bundle, a.node
	s := &state{
		Version: stateVersion, TrustDomain: a.cfg.TrustDomain.Name(), Boot: boot, Epoch: a.epoch, Revision: a.revision,
		Chains: make(map[string][][]byte),
	}
	entries := make([]*entryv1.Entry, 0, len(a.raw))
	for _, e := range a.raw {
		entries = append(entries, e)
	}
	a.mu.Unlock()
	var err error
	for _, e := range entries { // immutable once they were received
		b, merr := proto.Marshal(e)
		err = errors.Join(err, merr)
		s.Entries = append(s.Entries, b)
	}
	if node != nil {
		b, merr := proto.Marshal(node)
		err = errors.Join(err, merr)
		s.Node = b
	}
	if bundle != nil {
		s.Sequence = bundle.Sequence
		for _, r := range bundle.Roots {
			s.Roots = append(s.Roots, r.Raw)
		}
		for _, l := range bundle.Lists {
			s.Lists = append(s.Lists, stateList{Issuer: l.Issuer.Raw, List: l.List})
		}
	}
	if own != nil {
		k, kerr := s.keep(own.key, identity.NewCertificates(own.chain...), own.renewAt)
		err = errors.Join(err, kerr)
		s.Own = k
	}
	for _, r := range records {
		k, kerr := s.keep(r.SVID.Key, r.SVID.Chain, r.SVID.RenewAt)
		if kerr != nil {
			err = errors.Join(err, kerr)
			continue
		}
		kept := stateSVID{
			stateKey: *k, Instance: r.Instance, Entry: r.Entry, EntryDigest: r.EntryDigest[:],
			DNSNames: r.DNSNames, Hint: r.SVID.Hint,
		}
		for _, d := range r.Digests {
			kept.Digests = append(kept.Digests, []byte(d))
		}
		s.SVIDs = append(s.SVIDs, kept)
	}
	if err != nil {
		return nil, fmt.Errorf("encode the sealed cache: %w", err)
	}
	return s, nil
}

// keep encodes a key with its chain, whose intermediates are stored once.
func (s *state) keep(key any, chain []*identity.Certificate, renewAt time.Time) (*stateKey, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, errors.New("key cannot be encoded")
	}
	sum := sha256.New()
	for _, c := range chain[1:] {
		sum.Write(c.Raw)
	}
	name := hex.EncodeToString(sum.Sum(nil))
	if _, known := s.Chains[name]; !known {
		var rest [][]byte
		for _, c := range chain[1:] {
			rest = append(rest, c.Raw)
		}
		s.Chains[name] = rest
	}
	return &stateKey{Key: der, Leaf: chain[0].Raw, Chain: name, RenewAt: renewAt.Round(0)}, nil
}
