package tree

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/pkg/ledger"
)

// maxNoteBytes bounds what is read as a signed note: three lines, and signatures.
const maxNoteBytes = 64 << 10

// Checkpoint is a signed head of a tree (C2SP tlog-checkpoint).
type Checkpoint struct {
	Origin string
	Size   uint64   // number of records
	Root   [32]byte // RFC 6962 §2.1
	// Note is the checkpoint as it was signed, with all its signatures.
	Note []byte
	// Cosigned are the names of those of the given witnesses that have cosigned.
	Cosigned []string
}

// ErrSignature is wrapped by the error about a checkpoint that the given key has
// not signed.
var ErrSignature = errors.New("checkpoint is not signed by this log's key")

// ParseCheckpoint reads a checkpoint that was signed with key, and may have been
// cosigned by witnesses. Other signatures are ignored.
func ParseCheckpoint(b []byte, key note.Verifier, witnesses ...note.Verifier) (Checkpoint, error) {
	if len(b) > maxNoteBytes {
		return Checkpoint{}, fmt.Errorf("checkpoint has %d bytes, may have %d", len(b), maxNoteBytes)
	}
	n, err := note.Open(b, note.VerifierList(append([]note.Verifier{key}, witnesses...)...))
	_, unverified := errors.AsType[*note.UnverifiedNoteError](err)
	_, invalid := errors.AsType[*note.InvalidSignatureError](err)
	if unverified || invalid {
		return Checkpoint{}, fmt.Errorf("%w (%s)", ErrSignature, key.Name())
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	c, err := parseText(n.Text)
	if err != nil {
		return Checkpoint{}, err
	}
	c.Note = b
	signed := false
	for _, s := range n.Sigs {
		if s.Name == key.Name() && s.Hash == key.KeyHash() {
			signed = true
			continue
		}
		c.Cosigned = append(c.Cosigned, s.Name)
	}
	if !signed || c.Origin != key.Name() {
		return Checkpoint{}, fmt.Errorf("%w (%s)", ErrSignature, key.Name())
	}
	return c, nil
}

// parseText reads the text of a checkpoint. Lines behind the third are allowed and
// ignored.
func parseText(text string) (Checkpoint, error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 || lines[0] == "" {
		return Checkpoint{}, errors.New("checkpoint has fewer than three lines")
	}
	c := Checkpoint{Origin: lines[0]}
	size, err := strconv.ParseUint(lines[1], 10, 64)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] || size > maxSize {
		return Checkpoint{}, fmt.Errorf("checkpoint has the size %.32q, and a number was expected", lines[1])
	}
	c.Size = size
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, fmt.Errorf("checkpoint has the root hash %.64q, and 32 bytes in base64 were expected", lines[2])
	}
	copy(c.Root[:], root)
	return c, nil
}

// sign makes the checkpoint of a tree. The same tree gives the same bytes.
func sign(key *Key, size uint64, root tlog.Hash) (Checkpoint, error) {
	text := fmt.Sprintf("%s\n%d\n%s\n", key.signer.Name(), size, base64.StdEncoding.EncodeToString(root[:]))
	b, err := note.Sign(&note.Note{Text: text}, key.signer)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("sign checkpoint: %w", err)
	}
	return Checkpoint{Origin: key.signer.Name(), Size: size, Root: root, Note: b}, nil
}

// stateMagic begins the state.
const stateMagic = "meshid ledger tree 1\n"

// state is the head that was signed last, and the journal's head of that size.
type state struct {
	signed Checkpoint
	head   ledger.Head
}

// encode returns s as it is on the disk.
func (s state) encode() []byte {
	return fmt.Appendf(nil, "%shead %s\n\n%s", stateMagic, s.head, s.signed.Note)
}

// parseState reads what encode has written.
func parseState(b []byte, key note.Verifier) (state, error) {
	rest, ok := bytes.CutPrefix(b, []byte(stateMagic))
	line, signed, found := bytes.Cut(rest, []byte("\n\n"))
	text, isHead := strings.CutPrefix(string(line), "head ")
	if !ok || !found || !isHead {
		return state{}, errors.New("it is not the state of a tree")
	}
	head, err := ledger.ParseHead(text)
	if err != nil {
		return state{}, err
	}
	c, err := ParseCheckpoint(signed, key)
	if err != nil {
		return state{}, err
	}
	if c.Size != head.Size {
		return state{}, fmt.Errorf("it has a head of %d records and a checkpoint of %d", head.Size, c.Size)
	}
	return state{signed: c, head: head}, nil
}
