package jointoken

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// memory is Tokens in memory.
type memory struct {
	mu     sync.Mutex
	tokens map[[32]byte]*Token
	used   map[[32]byte]bool
	err    error // returned instead
}

func (m *memory) ConsumeToken(_ context.Context, sum [32]byte, now time.Time) (*Token, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[sum]
	switch {
	case m.err != nil:
		return nil, m.err
	case t == nil:
		return nil, fmt.Errorf("look up: %w", ErrUnknown)
	case m.used[sum]:
		return nil, fmt.Errorf("look up: %w", ErrUsed)
	case !now.Before(t.ExpiresAt):
		return nil, fmt.Errorf("look up: %w", ErrExpired)
	}
	m.used[sum] = true
	return t, nil
}

// stored makes a token and the store that knows it.
func stored(t *testing.T) (string, *memory, *Token) {
	t.Helper()
	secret, sum, err := NewToken()
	if err != nil {
		t.Fatal(err)
	}
	tok := &Token{
		NodeName: "db-7", CreatedBy: "spiffe://example.org/ops/ann",
		Labels: map[string]string{"rack": "b4"}, ExpiresAt: time.Now().Add(time.Hour),
	}
	return secret, &memory{tokens: map[[32]byte]*Token{sum: tok}, used: map[[32]byte]bool{}}, tok
}

// lookUps are Tokens that know none, and note what is looked for.
type lookUps struct{ sums [][32]byte }

func (l *lookUps) ConsumeToken(_ context.Context, sum [32]byte, _ time.Time) (*Token, error) {
	l.sums = append(l.sums, sum)
	return nil, ErrUnknown
}

// A token is looked for by its SHA-256, and by nothing else: a guess that is right in
// all but one byte takes the same way as any other, and looks for something that has
// nothing in common with what is stored.
func TestV_J9_TokensAreFoundByTheirHash(t *testing.T) {
	t.Parallel()
	secret, sum, err := NewToken()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := parse(secret)
	if err != nil {
		t.Fatal(err)
	}
	l := &lookUps{}
	v := NewVerifier(l)
	for i := range size {
		guess := slices.Clone(raw)
		guess[i] ^= 1
		for _, token := range [][]byte{guess, raw} {
			_, err := v.Verify(t.Context(), attest.Claim{Evidence: encode(token)}, nil)
			if !errors.Is(err, attest.ErrRefused) || !errors.Is(err, ErrUnknown) {
				t.Fatal(err)
			}
		}
		if n := len(l.sums); n != 2*(i+1) || l.sums[n-2] != sha256.Sum256(guess) || l.sums[n-1] != sum {
			t.Fatalf("with byte %d wrong %d look-ups were made, the last for %x", i, n, l.sums[n-2:])
		}
		same := 0
		for j, b := range l.sums[len(l.sums)-2] {
			if b == sum[j] {
				same++
			}
		}
		if same > 8 {
			t.Errorf("with byte %d wrong, %d bytes of what is looked for are right", i, same)
		}
	}
}

func TestConformance(t *testing.T) {
	attesttest.Node(t, attesttest.NodeConfig{
		Pair: func(t *testing.T) (attest.NodeAttester, attest.NodeVerifier) {
			secret, m, _ := stored(t)
			return NewAttester(secret), NewVerifier(m)
		},
		Once: true,
		// A2: everything is from the stored row, nothing from the request.
		Want: &attributesv1.Node{
			Method: "join_token", Id: "db-7", Labels: map[string]string{"rack": "b4"},
			JoinToken: &attributesv1.JoinToken{CreatedBy: "spiffe://example.org/ops/ann"},
		},
	})
}

// What is stored is a hash, and two tokens have nothing in common but the prefix.
func TestNewToken(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		secret, sum, err := NewToken()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := parse(secret)
		if err != nil {
			t.Fatal(err)
		}
		if sum != sha256.Sum256(raw) || len(raw) != 32 || seen[secret] {
			t.Fatalf("bad token of %d bytes", len(raw))
		}
		seen[secret] = true
	}
}

func TestV_A2_TokenText(t *testing.T) {
	secret, m, _ := stored(t)
	for name, text := range map[string]string{
		"empty":       "",
		"no prefix":   strings.TrimPrefix(secret, prefix),
		"slash":       prefix + strings.Repeat("/", 43),
		"NUL":         secret[:20] + "\x00" + secret[21:],
		"4-byte rune": secret[:20] + "\U0001F600" + secret[24:],
		"cut off":     secret[:len(secret)-1],
		"padded":      secret + "=",
		"line feed":   secret[:30] + "\n" + secret[30:],
		"spare bits":  secret[:len(secret)-1] + "_",
	} {
		t.Run(name, func(t *testing.T) {
			if text == secret {
				t.Skip("this token happens to end so")
			}
			_, err := NewAttester(text).Evidence(t.Context(), nil)
			if err == nil {
				t.Fatal("accepted")
			}
			if len(text) > 20 && strings.Contains(err.Error(), text[len(prefix):20]) {
				t.Errorf("the error repeats the token: %v", err)
			}
		})
	}
	// A file with the token ends with a line feed.
	evidence, err := NewAttester(secret+"\n").Evidence(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewVerifier(m).Verify(t.Context(), attest.Claim{Evidence: evidence}, nil); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	broken := errors.New("disk on fire")
	for name, tc := range map[string]struct {
		change  func(m *memory, tok *Token)
		want    error
		refused bool
	}{
		"unknown":       {func(m *memory, _ *Token) { clear(m.tokens) }, ErrUnknown, true},
		"expired":       {func(_ *memory, tok *Token) { tok.ExpiresAt = time.Now() }, ErrExpired, true},
		"no node name":  {func(_ *memory, tok *Token) { tok.NodeName = "" }, attest.ErrRefused, true},
		"store is down": {func(m *memory, _ *Token) { m.err = broken }, broken, false},
	} {
		t.Run(name, func(t *testing.T) {
			secret, m, tok := stored(t)
			tc.change(m, tok)
			evidence, err := NewAttester(secret).Evidence(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			n, err := NewVerifier(m).Verify(t.Context(), attest.Claim{Evidence: evidence}, nil)
			if n != nil || !errors.Is(err, tc.want) || errors.Is(err, attest.ErrRefused) != tc.refused {
				t.Errorf("node %v, error %v", n, err)
			}
		})
	}
}

// lenient is a store that forgets to look at the time.
type lenient struct{ tok *Token }

func (l lenient) ConsumeToken(context.Context, [32]byte, time.Time) (*Token, error) {
	return l.tok, nil
}

func TestExpiryIsCheckedTwice(t *testing.T) {
	secret, _, tok := stored(t)
	tok.ExpiresAt = time.Now().Add(-time.Second)
	evidence, err := NewAttester(secret).Evidence(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewVerifier(lenient{tok}).Verify(t.Context(), attest.Claim{Evidence: evidence}, nil); !errors.Is(err, ErrExpired) {
		t.Errorf("error %v, want %v", err, ErrExpired)
	}
}

func TestV_J4_TokenIsNotPrinted(t *testing.T) {
	secret, _, _ := stored(t)
	a := NewAttester(secret)
	var b strings.Builder
	slog.New(slog.NewJSONHandler(&b, nil)).Info("made", "attester", a)
	slog.New(slog.NewTextHandler(&b, nil)).Info("made", "attester", a)
	fmt.Fprintf(&b, "%v %+v %#v %s %q", a, a, a, a, a)
	if strings.Contains(b.String(), secret[len(prefix):]) {
		t.Errorf("token printed: %s", b.String())
	}
}

func FuzzEvidence(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{1}, make([]byte, 32)...))
	f.Add(append([]byte{2}, make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		raw, err := decode(b)
		if err != nil {
			return
		}
		if len(raw) != size || string(encode(raw)) != string(b) {
			t.Errorf("%x is decoded to %x", b, raw)
		}
	})
}
