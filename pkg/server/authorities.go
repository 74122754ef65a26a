package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// Names of authorities: an identifier is the SHA-1 of a key, a fingerprint the
// SHA-256 of a certificate, both in hexadecimal. As with commits, the beginning of
// one is enough if it is that of no other.
const (
	leastName = 6
	wholeID   = 40
)

// authorityName is the name of an authority as it is compared.
func authorityName(text string) (string, error) {
	name := strings.ToLower(strings.NewReplacer(":", "", " ", "").Replace(text))
	if len(name) < leastName || strings.Trim(name, "0123456789abcdef") != "" {
		return "", fail(kindInvalid, fmt.Sprintf("%q names no authority: write its id or the SHA-256 of its certificate in hexadecimal, "+
			"%d digits at least; `ca authority list` shows them", truncate(text), leastName), search.ErrNoRoot)
	}
	return name, nil
}

// authority returns the id of an authority that is named by it, or by the beginning
// of it.
func (l *ledgerService) authority(ctx context.Context, r Records, text string) (string, error) {
	if text == "" {
		return "", nil
	}
	name, err := authorityName(text)
	if err != nil || len(name) >= wholeID {
		return name, err
	}
	found, err := r.Names(ctx, "authority", name, 2)
	switch {
	case err != nil:
		return "", failFind(err)
	case len(found) == 0:
		return "", fail(kindNotFound, fmt.Sprintf("no record names an authority %q: `ca authority list` shows those that there are", truncate(text)), nil)
	case len(found) > 1:
		return "", fail(kindInvalid, fmt.Sprintf("%q is the beginning of several authorities: write more of it", truncate(text)), nil)
	default:
		return found[0], nil
	}
}

// Below returns the id of a root that is named by its id or its fingerprint, or by
// the beginning of one, and the ids of all intermediates that are known to chain to
// it: to this CA now, to all CAs of the trust domain while something of them may be
// valid, and to the ledger. Its error wraps search.ErrNoRoot if none, or more than
// one, is named so.
func (s *Server) Below(ctx context.Context, root string) (id string, intermediates []string, err error) {
	name, err := authorityName(root)
	if err != nil {
		return "", nil, err
	}
	roots := make(map[string]string) // id → fingerprint
	below := make(map[string]map[string]bool)
	under := func(root, id string) {
		if below[root] == nil {
			below[root] = make(map[string]bool)
		}
		below[root][id] = true
	}
	for _, a := range s.cfg.CA.Authorities() {
		if sum := sha256.Sum256(a.Certificate.Raw); a.Role == ca.RoleRoot {
			roots[a.ID] = hex.EncodeToString(sum[:])
		}
	}
	alive, err := s.cfg.CA.Intermediates(ctx)
	if err != nil {
		return "", nil, fail(kindUnavailable, "the store cannot be read now", err)
	}
	for _, i := range alive {
		under(i.Root, i.ID)
	}
	if s.cfg.Records != nil {
		q := search.Query{Event: ledgerv1.Event_EVENT_AUTHORITY, Limit: search.MaxFound}
		for more := true; more; more = q.After.Valid {
			var found []search.Found
			if found, q.After, err = s.cfg.Records.Find(ctx, q); err != nil {
				return "", nil, failFind(err)
			}
			for _, f := range found {
				switch a := f.Record.GetAuthority(); {
				case a.GetRole() == ca.RoleRoot:
					roots[a.GetId()] = hex.EncodeToString(a.GetSha256())
				case a.GetRoot() != "":
					under(a.GetRoot(), a.GetId())
				}
			}
		}
	}
	var matches []string
	for id, sum := range roots {
		if strings.HasPrefix(id, name) || strings.HasPrefix(sum, name) {
			matches = append(matches, id)
		}
	}
	switch len(matches) {
	case 1:
		return matches[0], slices.Sorted(maps.Keys(below[matches[0]])), nil
	case 0:
		return "", nil, fail(kindNotFound, fmt.Sprintf("there is no root %q, and was none: `ca authority list` shows those in the trust bundle, "+
			"`ca ledger find --event authority` all that there were", truncate(root)), search.ErrNoRoot)
	default:
		return "", nil, fail(kindInvalid, fmt.Sprintf("%q is the beginning of several roots: write more of it", truncate(root)), search.ErrNoRoot)
	}
}
