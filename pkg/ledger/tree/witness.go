package tree

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/meshid/meshid/internal/backoff"
)

const (
	witnessTimeout  = 5 * time.Second // for one answer
	maxAnswerBytes  = 16 << 10
	sizeContentType = "text/x.tlog.size" // C2SP tlog-witness, add-checkpoint

	algEd25519     = 1 // C2SP signed-note
	algCosignature = 4 // C2SP tlog-cosignature
)

// witnessPolicy is for witnesses that do not answer.
var witnessPolicy = backoff.Policy{Base: 2 * time.Second, Max: time.Minute}

// Witness is somebody who cosigns checkpoints that continue those that he has seen
// (C2SP tlog-witness).
type Witness struct {
	url string
	key note.Verifier
}

// NewWitness returns the witness with this URL, which add-checkpoint is below, and
// this verifier key: <name>+<hash>+<Ed25519 key>, of signature type 0x04, or 0x01
// as some witnesses print theirs.
func NewWitness(address, vkey string) (Witness, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return Witness{}, fmt.Errorf("%q is not the URL of a witness: write https://host/path", address)
	}
	key, err := ParseWitnessKey(vkey)
	if err != nil {
		return Witness{}, err
	}
	return Witness{url: strings.TrimSuffix(address, "/") + "/add-checkpoint", key: key}, nil
}

// Name returns the name in the witness's key.
func (w Witness) Name() string { return w.key.Name() }

// ParseWitnessKey reads the verifier key of a witness.
func ParseWitnessKey(vkey string) (note.Verifier, error) {
	fields := strings.SplitN(strings.TrimSpace(vkey), "+", 3)
	bad := func(reason string) error {
		return fmt.Errorf("%.200q is not the key of a witness (%s): write it as the witness prints it, <name>+<8 hexadecimal digits>+<base64>", vkey, reason)
	}
	if len(fields) != 3 || fields[0] == "" || strings.ContainsAny(fields[0], " \t\n") {
		return nil, bad("it has no three parts")
	}
	hash, err := strconv.ParseUint(fields[1], 16, 32)
	if err != nil || len(fields[1]) != 8 {
		return nil, bad("its hash is not hexadecimal")
	}
	key, err := base64.StdEncoding.DecodeString(fields[2])
	if err != nil || len(key) != 1+ed25519.PublicKeySize || key[0] != algEd25519 && key[0] != algCosignature {
		return nil, bad("it is no Ed25519 key")
	}
	if keyHash(fields[0], key) != uint32(hash) {
		return nil, bad("its hash does not fit")
	}
	key[0] = algCosignature // whatever it was announced as, it signs cosignatures
	return &cosigner{name: fields[0], hash: keyHash(fields[0], key), key: key[1:]}, nil
}

// keyHash is the key ID of C2SP signed-note.
func keyHash(name string, key []byte) uint32 {
	sum := sha256.Sum256(slices.Concat([]byte(name), []byte("\n"), key))
	return binary.BigEndian.Uint32(sum[:])
}

// cosigner verifies cosignatures of one Ed25519 key (C2SP tlog-cosignature).
type cosigner struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

// Name implements note.Verifier.
func (c *cosigner) Name() string { return c.name }

// KeyHash implements note.Verifier.
func (c *cosigner) KeyHash() uint32 { return c.hash }

// Verify implements note.Verifier.
func (c *cosigner) Verify(text, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	return ed25519.Verify(c.key, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at, text), sig[8:])
}

// witness is a Witness with what is known of it. It is owned by one goroutine.
type witness struct {
	Witness
	size    uint64 // of what it has cosigned last, as far as is known
	cosigns Checkpoint
	line    []byte // its signature on that
	backoff *backoff.Backoff
	next    time.Time // it is not asked again before
	err     error     // of the last time, nil if it cosigned
}

func newWitness(w Witness, p backoff.Policy) *witness {
	return &witness{Witness: w, backoff: backoff.New(p)}
}

// witnessClient asks witnesses. An answer that leads elsewhere is none.
var witnessClient = &http.Client{
	Timeout:       witnessTimeout,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport: &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   witnessTimeout,
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConnsPerHost:   2,
		ForceAttemptHTTP2:     true,
		ResponseHeaderTimeout: witnessTimeout,
	},
}

// collect asks the witnesses that have not cosigned c, and publishes it again with
// what came, or for the first time when a quorum was reached.
func (t *Tree) collect(ctx context.Context, c Checkpoint, start time.Time) error {
	if len(t.witnesses) == 0 {
		t.setWitnessed(c.Size, start)
		return nil
	}
	var wg sync.WaitGroup
	var asked []*witness
	for _, w := range t.witnesses {
		if w.has(c) || time.Now().Before(w.next) {
			continue
		}
		asked = append(asked, w)
		wg.Go(func() { w.ask(ctx, t.dir, c) })
	}
	wg.Wait()
	if err := t.judge(ctx, asked); err != nil {
		return err
	}
	full := c
	full.Note = bytes.Clone(c.Note)
	full.Cosigned = nil
	for _, w := range t.witnesses {
		if w.has(c) {
			full.Note = append(full.Note, w.line...)
			full.Cosigned = append(full.Cosigned, w.Name())
		}
	}
	published := t.Checkpoint()
	enough := len(full.Cosigned) >= t.options.Quorum
	if enough && (published.Size < c.Size || len(full.Cosigned) > len(published.Cosigned)) {
		if err := t.expose(full, start); err != nil {
			return err
		}
	}
	wanted := t.options.Quorum
	if wanted == 0 {
		wanted = len(t.witnesses)
	}
	if len(full.Cosigned) >= wanted {
		t.setWitnessed(c.Size, start)
	}
	return nil
}

// judge counts what the witnesses said. One that has seen another tree ends it all.
func (t *Tree) judge(ctx context.Context, asked []*witness) error {
	for _, w := range asked {
		switch {
		case w.err == nil:
			t.metrics.witness.WithLabelValues(resultCosigned).Inc()
		case errors.Is(w.err, ErrInconsistent):
			t.metrics.witness.WithLabelValues(resultRefused).Inc()
			return halting("witness %s: %w", w.Name(), w.err)
		default:
			t.metrics.witness.WithLabelValues(resultFailed).Inc()
			if w.backoff.Failures() == 1 {
				t.options.Logger.WarnContext(ctx, "a witness does not cosign the ledger's checkpoints; trying again", "witness", w.Name(), "err", w.err)
			}
		}
	}
	return nil
}

// setWitnessed takes note that a checkpoint has enough cosignatures.
func (t *Tree) setWitnessed(size uint64, start time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.witnessed = size
	t.unseen = time.Time{}
	if t.journal.Size() > size {
		t.unseen = start
	}
}

// unwitnessed returns for how long a record has been waiting for witnesses.
func (t *Tree) unwitnessed(now time.Time) time.Duration {
	if len(t.options.Witnesses) == 0 {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return waited(&t.unseen, now, t.witnessed, t.journal.Size())
}

// WitnessHealth returns what an operator should know of the witnesses at the time
// now: that the newest records have not been cosigned for more than a minute.
func (t *Tree) WitnessHealth(now time.Time) error {
	if d := t.unwitnessed(now); d > staleAfter {
		return fmt.Errorf("the ledger's checkpoints have not been cosigned for %v: see the log for which witness does not answer", d.Round(time.Second))
	}
	return nil
}

// nextWitness returns when a witness is to be asked again; the zero time if all
// have cosigned.
func (t *Tree) nextWitness() time.Time {
	var next time.Time
	for _, w := range t.witnesses {
		if !w.has(t.state.signed) && (next.IsZero() || w.next.Before(next)) {
			next = w.next
		}
	}
	return next
}

// has reports whether the witness has cosigned c.
func (w *witness) has(c Checkpoint) bool {
	return w.line != nil && w.cosigns.Size == c.Size && w.cosigns.Root == c.Root
}

// ask asks for a cosignature on c.
func (w *witness) ask(ctx context.Context, dir string, c Checkpoint) {
	ctx, cancel := context.WithTimeout(ctx, witnessTimeout)
	defer cancel()
	line, err := w.submit(ctx, dir, c)
	w.err = err
	if err != nil {
		w.next = time.Now().Add(w.backoff.Next())
		return
	}
	w.backoff.Reset()
	w.next = time.Time{}
	w.size, w.cosigns, w.line = c.Size, c, line
}

// submit sends c. That the witness has another size than was thought is found out
// from its answer.
func (w *witness) submit(ctx context.Context, dir string, c Checkpoint) ([]byte, error) {
	for range 2 {
		line, conflict, err := w.post(ctx, dir, c)
		if conflict == nil {
			return line, err
		}
		switch {
		case *conflict > c.Size:
			return nil, fmt.Errorf("%w: the witness has cosigned %d records, and there are %d: was an older copy restored?", ErrInconsistent, *conflict, c.Size)
		case *conflict == w.size && w.size == c.Size:
			return nil, fmt.Errorf("%w: the witness has cosigned another tree of %d records", ErrInconsistent, c.Size)
		}
		w.size = *conflict
	}
	return nil, errors.New("the witness contradicts itself about what it has cosigned")
}

// post is one request. conflict is what the witness says it has cosigned, if that
// is not what was thought.
func (w *witness) post(ctx context.Context, dir string, c Checkpoint) (line []byte, conflict *uint64, err error) {
	if w.size > c.Size {
		w.size = 0 // ask it again
	}
	var body bytes.Buffer
	fmt.Fprintf(&body, "old %d\n", w.size)
	if w.size > 0 && w.size < c.Size {
		proof, err := proveTree(dir, c, w.size, c.Size)
		if err != nil {
			return nil, nil, err
		}
		for i := range proof {
			body.WriteString(base64.StdEncoding.EncodeToString(proof[i][:]) + "\n")
		}
	}
	body.WriteByte('\n')
	body.Write(c.Note)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, &body)
	if err != nil {
		return nil, nil, err
	}
	resp, err := witnessClient.Do(req)
	if err != nil {
		return nil, nil, err
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		line, err = w.cosignature(c, answer)
		return line, nil, err
	case http.StatusConflict:
		size, err := strconv.ParseUint(strings.TrimSuffix(string(answer), "\n"), 10, 64)
		if err != nil || !strings.HasPrefix(resp.Header.Get("Content-Type"), sizeContentType) {
			// C2SP: also the answer to another root hash of the same size.
			if w.size == c.Size && w.size > 0 {
				return nil, &w.size, nil
			}
			return nil, nil, fmt.Errorf("the witness answers %s without the size of what it has cosigned", resp.Status)
		}
		return nil, &size, nil
	case http.StatusUnprocessableEntity:
		return nil, nil, fmt.Errorf("%w: the witness refuses the proof that the tree of %d records continues that of %d", ErrInconsistent, c.Size, w.size)
	case http.StatusNotFound:
		return nil, nil, fmt.Errorf("the witness does not know the log %s: have its operator add it, with the key that `ca ledger key` prints", c.Origin)
	case http.StatusForbidden:
		return nil, nil, fmt.Errorf("the witness knows the log %s with another key: give its operator the one that `ca ledger key` prints", c.Origin)
	default:
		return nil, nil, fmt.Errorf("the witness answers %s", resp.Status)
	}
}

// cosignature finds the witness's signature line in an answer.
func (w *witness) cosignature(c Checkpoint, answer []byte) ([]byte, error) {
	n, err := note.Open(slices.Concat(c.Note, answer), note.VerifierList(w.key))
	if err != nil || len(n.Sigs) == 0 {
		return nil, fmt.Errorf("the witness's answer has no signature by %s", w.Name())
	}
	s := n.Sigs[0]
	return fmt.Appendf(nil, "— %s %s\n", s.Name, s.Base64), nil
}
