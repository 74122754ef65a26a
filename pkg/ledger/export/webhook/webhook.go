// Package webhook posts records of the ledger to a URL. It answers "has the
// receiver taken this batch". It does not know what the receiver does with it.
//
// Requests are those of the Standard Webhooks specification 1.0.0: the header
// webhook-id names the batch, and comes again if the batch does;
// webhook-signature is an HMAC-SHA256, with a secret that both sides have, over
// id, time and body. The body is
//
//	{"journal":"<32 hex digits>","first":7,"next":9,"records":[…,…]}
//
// where records are those from first on and below next that the filter lets pass.
package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ledger/export"
)

const (
	defaultMaxBytes = 1 << 20
	secretPrefix    = "whsec_"
	leastSecret     = 24 // Standard Webhooks: from 24 to 64 bytes
)

// Config is the settings of one export to a webhook.
type Config struct {
	// URL that batches are posted to; https:// unless it is on this machine.
	URL string `yaml:"url"`
	// File with the secret that signs requests, which nobody else may read:
	// whsec_ and at least 24 bytes in base64, as `openssl rand -base64 32` makes.
	SecretFile string `yaml:"secret_file"`
	// File with further headers, such as "authorization: Bearer …", one a line;
	// nobody else may read it.
	HeadersFile string `yaml:"headers_file"`
	// How the receiver is verified, and how it can verify this CA.
	TLS export.TLS `yaml:"tls"`
	// How records are written: json (the ledger's own) or ocsf.
	Format string `yaml:"format" default:"json"`
	// The longest body that the receiver takes. A batch that does not fit is
	// divided, and a record that does not fit is abridged.
	MaxBytes int `yaml:"max_bytes" default:"1048576"`
}

// Webhook is an export.Target.
type Webhook struct {
	config Config
	format export.Format
	poster *export.Poster

	done uint64 // all below were taken, though their batch was not as a whole
}

// New checks the settings. Its errors are *export.SettingErrors.
func New(c Config, formats export.Formats) (*Webhook, error) {
	if c.Format == "" {
		c.Format = "json"
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = defaultMaxBytes
	}
	if c.MaxBytes < 1<<14 || c.MaxBytes > 64<<20 {
		return nil, export.Bad("max_bytes", "%d is out of range: write a number from 16384 to 67108864", c.MaxBytes)
	}
	format, err := formats.Get(c.Format, "json", "ocsf")
	if err != nil {
		return nil, err
	}
	p, err := export.NewPoster("url", c.URL, c.TLS, c.HeadersFile)
	if err != nil {
		return nil, err
	}
	t := &Webhook{config: c, format: format, poster: p}
	_, err = t.secret()
	return t, err
}

// secret reads the secret, which may have been renewed.
func (t *Webhook) secret() ([]byte, error) {
	if t.config.SecretFile == "" {
		return nil, export.Bad("secret_file", "missing; write the path of a file made with: (umask 077; echo whsec_$(openssl rand -base64 32) > FILE)")
	}
	text, err := durable.ReadSecret(t.config.SecretFile, 4096)
	if err != nil {
		return nil, export.Bad("secret_file", "%v", err)
	}
	encoded, found := bytes.CutPrefix(bytes.TrimSpace(text), []byte(secretPrefix))
	secret, err := base64.StdEncoding.AppendDecode(nil, encoded)
	if !found || err != nil || len(secret) < leastSecret {
		return nil, export.Bad("secret_file", "%s does not hold whsec_ and at least %d bytes in base64", t.config.SecretFile, leastSecret)
	}
	return secret, nil
}

// Send implements export.Target.
func (t *Webhook) Send(ctx context.Context, b export.Batch) error {
	const envelope = 256 // bytes of a body without its records
	var records [][]byte
	first, size := max(b.First, t.done), envelope
	post := func(next uint64) error {
		if err := t.post(ctx, b.Journal, first, next, records); err != nil {
			return err
		}
		first, t.done, records, size = next, next, nil, envelope
		return nil
	}
	for _, e := range b.Entries {
		if e.Index < t.done {
			continue
		}
		line, _ := export.Encode(t.format, e, t.config.MaxBytes-envelope)
		if len(records) > 0 && size+len(line)+1 > t.config.MaxBytes {
			if err := post(e.Index); err != nil {
				return err
			}
		}
		records = append(records, line)
		size += len(line) + 1
	}
	if len(records) == 0 {
		return nil
	}
	return post(b.Next)
}

// post sends one request.
func (t *Webhook) post(ctx context.Context, journal string, first, next uint64, records [][]byte) error {
	secret, err := t.secret()
	if err != nil {
		return err
	}
	body := fmt.Appendf(nil, `{"journal":"%s","first":%d,"next":%d,"records":[%s]}`, journal, first, next, bytes.Join(records, []byte{','}))
	id := fmt.Sprintf("%s-%d-%d", journal, first, next)
	now := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	fmt.Fprintf(mac, "%s.%s.%s", id, now, body)
	_, err = t.poster.Post(ctx, http.Header{
		"Content-Type":      {"application/json"},
		"User-Agent":        {"meshid-ca"},
		"Webhook-Id":        {id},
		"Webhook-Timestamp": {now},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))},
	}, body)
	return err
}
