package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/server/registry"
)

// Join tokens in the Anchor are those that the ledger says were made, and not used or
// withdrawn since. A row of the store that is none of them lets nobody in:
//
//  1. at the start, as with nodes (anchor_nodes.go): it is recorded, removed from the
//     store, and an alarm
//  2. when a token is used, since rows can be changed while the CA runs as well: the
//     store says that it can be, in one transaction, and then the Anchor that it was
//     made like this, and was not used
//
// A token that is in the store no longer, or is used up there, is worth nothing,
// whatever the ledger says: a CA that is killed between using a token and recording
// it leaves that behind.

// reasonTokenUnrecorded is a reason of EVENT_STORE_EDITED.
const reasonTokenUnrecorded = "token_unrecorded"

// forgetTokens is how long after its end a token is forgotten: a clock may be set.
const forgetTokens = 24 * time.Hour

// anchoredToken is a token that can be used.
type anchoredToken struct {
	Digest  string    `json:"digest"` // of what it gives a node
	Expires time.Time `json:"expires"`
}

// anchorToken notes a token that gives a node these attributes.
func anchorToken(a *attributesv1.Node, expires time.Time) anchoredToken {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q", a.GetId(), a.GetJoinToken().GetCreatedBy())
	for _, name := range slices.Sorted(maps.Keys(a.GetLabels())) {
		fmt.Fprintf(h, " %q=%q", name, a.GetLabels()[name])
	}
	return anchoredToken{hex.EncodeToString(h.Sum(nil)), expires.UTC().Round(0)}
}

// wantedTokens are the tokens that the ledger knows, by SHA-256 in hexadecimal.
type wantedTokens struct {
	open map[string]anchoredToken
	// deleted are those that were withdrawn. It is recorded first, so the store may
	// still have the last one.
	deleted map[string]anchoredToken
}

// take takes a record.
func (w *wantedTokens) take(r *ledgerv1.Record) {
	id, success := hex.EncodeToString(r.GetTokenSha256()), r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS
	switch r.GetEvent() {
	case ledgerv1.Event_EVENT_TOKEN_CREATED:
		if success {
			w.open[id] = anchorToken(r.GetNode().GetAttributes(), r.GetTokenExpires().AsTime())
		}
	case ledgerv1.Event_EVENT_TOKEN_USED:
		// Whoever is refused for another reason, such as a ban, has used it up all the same.
		if success || r.GetReason() != reasonAttestation && r.GetReason() != reasonUnavailable {
			delete(w.open, id)
		}
	case ledgerv1.Event_EVENT_TOKEN_DELETED:
		if t, ok := w.open[id]; ok && success {
			w.deleted[id] = t
			delete(w.open, id)
		}
	default:
	}
}

// judge returns those of the store's tokens that can be used, those that are not
// believed, and those that were withdrawn just before the CA ended.
func (w *wantedTokens) judge(stored []*registry.Token) (open map[string]anchoredToken, edited, withdrawn []*registry.Token) {
	open = make(map[string]anchoredToken, len(stored))
	for _, t := range stored {
		id, is := hex.EncodeToString(t.SHA256[:]), anchorToken(tokenAttributes(t), t.ExpiresAt)
		switch {
		case w == nil || w.open[id] == is:
			open[id] = is
		case w.deleted[id] == is:
			withdrawn = append(withdrawn, t)
		default:
			edited = append(edited, t)
		}
	}
	return open, edited, withdrawn
}

// tokens are those that the ledger knows; nil if nobody knows.
func (w *wanted) knownTokens() *wantedTokens {
	if w == nil {
		return nil
	}
	return &w.tokens
}

// believeTokens begins with those tokens of the store that the ledger knows, and
// removes the others.
func (s *Server) believeTokens(ctx context.Context) error {
	a := s.cfg.Anchor
	if a == nil {
		return nil
	}
	stored, err := s.cfg.Store.Tokens(ctx, time.Now())
	if err != nil {
		return err
	}
	open, edited, withdrawn := a.wanted.knownTokens().judge(stored)
	records := make([]*ledgerv1.Record, 0, len(edited))
	for _, t := range edited {
		records = append(records, s.tokenEdited(ctx, t.SHA256[:], s.tokenNodeID(t)))
	}
	if err := s.append(ctx, records...); err != nil {
		return fmt.Errorf("record what is not believed of the store: %w", err)
	}
	for _, t := range slices.Concat(edited, withdrawn) {
		if err := s.cfg.Store.DeleteToken(ctx, t.SHA256, recordNothing); err != nil { // it is worth nothing all the same
			s.log.ErrorContext(ctx, "a join token cannot be removed from the database", "err", err)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tokens = open
	return nil
}

// recordNothing is for changes of the store that are recorded already.
func recordNothing() error { return nil }

// tokenEdited returns the record of a token that is not believed. What the store
// says of it besides is not repeated.
func (s *Server) tokenEdited(ctx context.Context, sum []byte, node string) *ledgerv1.Record {
	r := s.ownRecord(ledgerv1.Event_EVENT_STORE_EDITED)
	r.Outcome, r.Reason, r.TokenSha256 = ledgerv1.Outcome_OUTCOME_REFUSED, reasonTokenUnrecorded, sum
	r.Node = &ledgerv1.NodeRef{Id: node}
	what := "the join token " + tokenID([32]byte(sum))
	r.Detail = what + " is in the database as it never was in the ledger, or was used or withdrawn: it lets nobody in"
	s.cfg.Anchor.noteEdited(what)
	s.log.ErrorContext(ctx, "somebody has written to the database", "reason", r.GetReason(), "detail", r.GetDetail(), "node_id", node)
	return r
}

// noteToken notes a token that was made, or, with nil, was withdrawn.
func (a *Anchor) noteToken(sum [32]byte, t *registry.Token) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if id := hex.EncodeToString(sum[:]); t == nil {
		delete(a.tokens, id)
	} else {
		a.tokens[id] = anchorToken(tokenAttributes(t), t.ExpiresAt)
	}
}

// claim uses up a token that the store has just given out for a node with these
// attributes, and reports whether the ledger knows it like this.
func (a *Anchor) claim(sum [32]byte, at time.Time, node *attributesv1.Node) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := hex.EncodeToString(sum[:])
	t, ok := a.tokens[id]
	if !ok || !at.Before(t.Expires) || t != anchorToken(node, t.Expires) {
		return false
	}
	delete(a.tokens, id)
	return true
}

// claimToken returns an error if the token with which somebody has just proved to be
// a node is not one that the CA made for it.
func (a *attestation) claimToken(ctx context.Context, node *attributesv1.Node) error {
	s := a.s
	if a.method != methodJoinToken || s.cfg.Anchor == nil || s.cfg.Anchor.claim([32]byte(a.token), a.c.began, node) {
		return nil
	}
	r := s.tokenEdited(ctx, a.token, s.tokenNodeID(&registry.Token{NodeName: node.GetId()}))
	r.RequestId = a.c.requestID
	s.reportBroken()
	if err := s.append(ctx, r); err != nil {
		s.log.ErrorContext(ctx, "what is not believed of the store cannot be recorded", "err", err)
	}
	return errors.New("the ledger does not know the join token as it is in the database: somebody has written to it")
}

// openTokens returns the tokens that can be used; of a store that was written to, those
// that the ledger knows.
func (s *Server) openTokens(ctx context.Context) ([]*registry.Token, error) {
	tokens, err := s.cfg.Store.Tokens(ctx, time.Now())
	a := s.cfg.Anchor
	if err != nil || a == nil {
		return tokens, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(tokens, func(t *registry.Token) bool {
		return a.tokens[hex.EncodeToString(t.SHA256[:])] != anchorToken(tokenAttributes(t), t.ExpiresAt)
	}), nil
}

// tokensNow returns the tokens that can be used, for the file.
func (a *Anchor) tokensNow(now time.Time) map[string]anchoredToken {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.tokens, func(_ string, t anchoredToken) bool { return now.Sub(t.Expires) > forgetTokens })
	return maps.Clone(a.tokens)
}
