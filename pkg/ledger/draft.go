package ledger

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// MaxRecordBytes is the size of the largest record that a journal takes, and the
// most that a reader allocates for one: what an entry bundle of C2SP tlog-tiles
// can hold.
const MaxRecordBytes = 1<<16 - 1

// ErrRecord is wrapped by the error of Append for a draft that can never be
// recorded: the record is empty, too large, not valid, or does not name the
// certificate that is to be released with it.
var ErrRecord = errors.New("record not acceptable")

// Draft is a decision that is not recorded yet, with the certificate chain that
// it releases (nil for a decision that releases none). The chain cannot be taken
// out of a Draft: it is had from the Durable that Append returns.
type Draft struct {
	record *ledgerv1.Record
	frame  []byte   // room for the frame's head, then the record's bytes
	hash   [32]byte // of the record's bytes
	chain  [][]byte
	err    error // why the draft is not acceptable
}

// NewDraft encodes r as it is now; changes of r afterwards are not recorded, and
// Durable.Record would show what is not so: both arguments belong to the draft
// from here on. chain is the certificate chain in DER, leaf first; if it is not
// empty, r.certificate.sha256 must be the leaf's hash. A record that is not
// acceptable is reported by Append. NewDraft may be called concurrently; it
// does the work of encoding and hashing, so that the journal's writer need not.
func NewDraft(r *ledgerv1.Record, chain [][]byte) *Draft {
	d := &Draft{record: r, chain: chain}
	d.frame, d.err = encode(r)
	if d.err != nil {
		return d
	}
	// The byte before the record is the prefix of the hash; the writer puts the
	// frame's head over it, in a copy.
	d.frame[frameHead-1] = leafPrefix
	d.hash = sha256.Sum256(d.frame[frameHead-1:])
	if len(chain) > 0 {
		if leaf := sha256.Sum256(chain[0]); string(leaf[:]) != string(r.GetCertificate().GetSha256()) {
			d.err = fmt.Errorf("%w: certificate.sha256 is not the hash of the certificate to be released", ErrRecord)
		}
	}
	return d
}

// encode returns room for a frame's head and then r's deterministic encoding.
func encode(r *ledgerv1.Record) ([]byte, error) {
	options := proto.MarshalOptions{Deterministic: true, UseCachedSize: true}
	size := proto.MarshalOptions{Deterministic: true}.Size(r)
	if size == 0 || size > MaxRecordBytes {
		return nil, fmt.Errorf("%w: %d bytes, may be 1 to %d", ErrRecord, size, MaxRecordBytes)
	}
	frame, err := options.MarshalAppend(make([]byte, frameHead, frameHead+padded(size)), r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return frame, nil
}

// Format prints no more than what this is: without it, the fmt package would
// show the chain.
func (Draft) Format(s fmt.State, _ rune) {
	_, _ = io.WriteString(s, "ledger.Draft") // fmt.State has no use for an error
}

// LogValue is as silent as Format.
func (Draft) LogValue() slog.Value { return slog.StringValue("ledger.Draft") }

// Durable is a decision whose record is on the disk. All methods may be called
// concurrently.
type Durable struct {
	record *ledgerv1.Record
	index  uint64
	hash   [32]byte
	chain  [][]byte
}

// Chain returns the certificate chain that was put in the draft. It is the only
// way to it. The caller must not modify it.
func (d *Durable) Chain() [][]byte { return d.chain }

// Record returns the record. The caller must not modify it.
func (d *Durable) Record() *ledgerv1.Record { return d.record }

// Index returns the record's place in its journal, counted from 0.
func (d *Durable) Index() uint64 { return d.index }

// Hash returns the record's hash: the RFC 6962 §2.1 leaf hash of its bytes.
func (d *Durable) Hash() [32]byte { return d.hash }
