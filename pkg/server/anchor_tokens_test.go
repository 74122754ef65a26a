package server

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/server/registry"
	"github.com/meshid/meshid/test/identitytest"
)

// sumOf is the SHA-256 by which the store names a token.
func sumOf(t *testing.T, token string) []byte {
	t.Helper()
	evidence, err := jointoken.NewAttester(token).Evidence(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(evidence[1:])
	return sum[:]
}

// edited returns the reasons of what was not believed of the store.
func (h *house) edited() string {
	h.t.Helper()
	var reasons []string
	for _, r := range h.records(ledgerv1.Event_EVENT_STORE_EDITED) {
		reasons = append(reasons, r.GetReason())
	}
	return strings.Join(reasons, " ")
}

// alarmed reports whether an operator is told that the store was written to.
func (h *house) alarmed() bool {
	for _, c := range h.health.Conditions() {
		if c.Name == conditionUnrecorded && c.Severity != health.OK {
			return true
		}
	}
	return false
}

// wantJoin checks whether a token lets somebody in.
func (h *house) wantJoin(what, token string, want bool) {
	h.t.Helper()
	conn := h.dial(nil, nil)
	defer conn.Close()
	_, err := h.attest(conn, token, newKey(h.t))
	if want && err != nil || !want && status.Code(err) != codes.PermissionDenied {
		h.t.Errorf("%s: a token that is to let in is %v, and the answer is %v", what, want, err)
	}
}

const insertToken = `INSERT INTO join_tokens (sha256, node_name, labels, created_by, created_at, expires_at, used_at)
	VALUES (?1, 'stranger', '{}', 'uid:0', ?2, ?3, 0)`

// tokenEdits are what somebody may do to the tokens in the database, each to one of
// those that the test has made.
func tokenEdits(t *testing.T, own, open, used, deleted, expired string) map[string]struct {
	query string
	args  []any
	token string // that lets nobody in afterwards
} {
	t.Helper()
	now := time.Now()
	return map[string]struct {
		query string
		args  []any
		token string
	}{
		"one is made":                 {insertToken, []any{sumOf(t, own), now.UnixNano(), now.Add(time.Hour).UnixNano()}, own},
		"one is used again":           {"UPDATE join_tokens SET used_at = 0 WHERE sha256 = ?1", []any{sumOf(t, used)}, used},
		"a withdrawn one is back":     {insertToken, []any{sumOf(t, deleted), now.UnixNano(), now.Add(time.Hour).UnixNano()}, deleted},
		"an expired one lives longer": {"UPDATE join_tokens SET expires_at = ?2 WHERE sha256 = ?1", []any{sumOf(t, expired), now.Add(time.Hour).UnixNano()}, expired},
		"one is for another node":     {"UPDATE join_tokens SET node_name = 'stranger' WHERE sha256 = ?1", []any{sumOf(t, open)}, open},
		"one gives other labels":      {`UPDATE join_tokens SET labels = '{"zone":"b"}' WHERE sha256 = ?1`, []any{sumOf(t, open)}, open},
		"one is by another operator":  {"UPDATE join_tokens SET created_by = 'uid:7' WHERE sha256 = ?1", []any{sumOf(t, open)}, open},
	}
}

// Whoever writes the database makes no join token of his own, and makes none good for
// more than an operator made it: neither before the CA starts, whatever the anchor had
// by then, nor while it runs. It is recorded, said, and put right; and nobody cries
// wolf where nothing was changed.
func TestFault_F17_TokensEditedByHand(t *testing.T) {
	t.Parallel()
	origin := newAnchoredHouse(t, t.TempDir())
	origin.apply(shopEntry("web"))
	origin.join("early", nil)
	early, err := os.ReadFile(filepath.Join(origin.dir, "store.anchor"))
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{"zone": "a", "rack": "1"}
	own, _, err := jointoken.NewToken()
	if err != nil {
		t.Fatal(err)
	}
	open, used, deleted, expired := origin.token("open", labels), origin.token("used", nil), origin.token("deleted", nil), origin.token("expired", nil, 1)
	origin.wantJoin("the one that is used", used, true)
	admin, ctx := origin.admin()
	if _, err := admin.DeleteToken(ctx, &adminv1.DeleteTokenRequest{Id: tokenID([32]byte(sumOf(t, deleted)))}); err != nil {
		t.Fatal(err)
	}
	origin.stop()

	for name, anchor := range map[string][]byte{"newest": nil, "from before": early, "none": {}, "without tokens": []byte("old version")} {
		start := func(t *testing.T) *house {
			t.Helper()
			dir := t.TempDir()
			copyTree(t, dir, origin.dir)
			path, err := filepath.Join(dir, "store.anchor"), error(nil)
			switch string(anchor) {
			case "":
				if anchor != nil {
					err = os.Remove(path)
				}
			case "old version":
				var kept *anchored
				if kept, err = readAnchor(path); err == nil {
					kept.Tokens = nil
					err = kept.write(path)
				}
			default:
				err = os.WriteFile(path, anchor, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			return &house{t: t, dir: dir, log: new(identitytest.Log)}
		}
		t.Run("nothing, anchor "+name, func(t *testing.T) {
			t.Parallel()
			h := start(t)
			h.start(h.anchored)
			defer func() { h.stop() }()
			h.wantJoin("used", used, false)
			h.wantJoin("withdrawn", deleted, false)
			h.wantJoin("expired", expired, false)
			h.wantJoin("unknown", own, false)
			h.wantJoin("open", open, true)
			h.wantJoin("open, again", open, false)
			if h.edited() != "" || h.alarmed() {
				t.Errorf("recorded is %q, the alarm is %v", h.edited(), h.alarmed())
			}
		})
		for what, edit := range tokenEdits(t, own, open, used, deleted, expired) {
			for when, running := range map[string]bool{"before the start": false, "while it runs": true} {
				t.Run(fmt.Sprintf("%s %s, anchor %s", what, when, name), func(t *testing.T) {
					t.Parallel()
					h := start(t)
					if !running {
						h.edit(edit.query, edit.args...)
					}
					h.start(h.anchored)
					defer func() { h.stop() }()
					if running {
						h.edit(edit.query, edit.args...)
					} else if h.edited() != reasonTokenUnrecorded || !h.alarmed() {
						t.Errorf("recorded is %q, the alarm is %v", h.edited(), h.alarmed())
					}
					h.wantJoin(what, edit.token, false)
					if h.edited() != reasonTokenUnrecorded || !h.alarmed() {
						t.Errorf("recorded is %q, the alarm is %v", h.edited(), h.alarmed())
					}
					if n, ok := h.server.registry.Node("spiffe://example.org/meshid/node/join_token/stranger"); ok {
						t.Errorf("there is a node %v", n)
					}
					if edit.token != open {
						h.wantJoin("the one that nobody has touched", open, true)
					}
					h.stop()
					h.start(h.anchored)
					if h.edited() != reasonTokenUnrecorded || h.alarmed() { // it was put right
						t.Errorf("at the next start, recorded is %q, the alarm is %v", h.edited(), h.alarmed())
					}
				})
			}
		}
	}
}

// The CA is killed when the withdrawal of a token was recorded and not committed:
// nobody has written to the database, and the token is worth nothing.
func TestFault_F16_KilledWhileATokenIsWithdrawn(t *testing.T) {
	t.Parallel()
	h := newAnchoredHouse(t, t.TempDir())
	token := h.token("node", map[string]string{"zone": "a"})
	stored, err := h.store.Tokens(t.Context(), time.Now())
	if err != nil || len(stored) != 1 {
		t.Fatal(stored, err)
	}
	path := filepath.Join(h.dir, "store.anchor")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := h.server.ownRecord(ledgerv1.Event_EVENT_TOKEN_DELETED)
	r.Node, r.TokenSha256 = h.server.tokenNodeRef(stored[0]), stored[0].SHA256[:]
	if err := h.server.append(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	h.stop()
	if err := os.WriteFile(path, before, 0o600); err != nil { // whoever is killed notes nothing
		t.Fatal(err)
	}
	h.start(h.anchored)
	h.wantJoin("withdrawn", token, false)
	if h.edited() != "" || h.alarmed() {
		t.Errorf("recorded is %q, the alarm is %v", h.edited(), h.alarmed())
	}
	if stored, err = h.store.Tokens(t.Context(), time.Now()); err != nil || len(stored) != 0 {
		t.Errorf("stored is %v: %v", stored, err)
	}
}

// A token that is not believed is not listed, and can be deleted.
func TestTokenThatIsNotListed(t *testing.T) {
	t.Parallel()
	h := newAnchoredHouse(t, t.TempDir())
	h.token("listed", nil)
	own, sum, err := jointoken.NewToken()
	if err != nil {
		t.Fatal(err)
	}
	h.edit(insertToken, sum[:], time.Now().UnixNano(), time.Now().Add(time.Hour).UnixNano())
	admin, ctx := h.admin()
	list, err := admin.ListTokens(ctx, &adminv1.ListTokensRequest{})
	if err != nil || len(list.GetTokens()) != 1 || !strings.HasSuffix(list.GetTokens()[0].GetNodeId(), "/listed") {
		t.Errorf("listed is %v: %v", list, err)
	}
	if _, err := admin.DeleteToken(ctx, &adminv1.DeleteTokenRequest{Id: tokenID(sum)}); err != nil {
		t.Error(err)
	}
	h.wantJoin("deleted", own, false)
}

// What the anchor notes of a token is the same by the row, by the record and by the
// node that has used it, and differs in all that the token gives.
func TestAnchorToken(t *testing.T) {
	t.Parallel()
	ends := time.Now().Add(time.Hour)
	base := registry.Token{NodeName: "n", CreatedBy: "uid:0", Labels: map[string]string{"a": "b", "c": "d"}, ExpiresAt: ends}
	note := func(tok registry.Token) anchoredToken { return anchorToken(tokenAttributes(&tok), tok.ExpiresAt) }
	same := base
	same.Labels, same.ExpiresAt = map[string]string{"c": "d", "a": "b"}, ends.Local()
	if note(same) != note(base) {
		t.Error("the same token is noted otherwise")
	}
	seen := map[anchoredToken]string{note(base): "nothing"}
	for what, change := range map[string]func(*registry.Token){
		"name":         func(r *registry.Token) { r.NodeName = "m" },
		"operator":     func(r *registry.Token) { r.CreatedBy = "uid:1" },
		"end":          func(r *registry.Token) { r.ExpiresAt = ends.Add(1) },
		"value":        func(r *registry.Token) { r.Labels = map[string]string{"a": "b", "c": "e"} },
		"no labels":    func(r *registry.Token) { r.Labels = nil },
		"moved border": func(r *registry.Token) { r.Labels = map[string]string{"a": `b" "c"="d`} },
		"not UTF-8":    func(r *registry.Token) { r.NodeName = "n\xff" },
		"replaced":     func(r *registry.Token) { r.NodeName = "n\uFFFD" },
	} {
		changed := base
		change(&changed)
		if other, twice := seen[note(changed)]; twice {
			t.Errorf("%s is noted as %s is", what, other)
		}
		seen[note(changed)] = what
	}
}
