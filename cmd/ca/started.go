package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"regexp"
	"time"

	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// recordTimeout bounds the wait for the records of start and end.
const recordTimeout = 10 * time.Second

// recordStart records that the CA starts, with which version and configuration.
// stopped records that it has stopped in good order.
func recordStart(ctx context.Context, journal *ledger.Journal, vkey string, v *validated) (stopped func(context.Context) error, err error) {
	settings, err := effectiveSettings(v)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte(settings))
	record := func(ctx context.Context, event ledgerv1.Event, detail string, c *ledgerv1.Configuration) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
		defer cancel()
		_, err := journal.Append(ctx, ledger.NewDraft(&ledgerv1.Record{
			Version: 1, Time: timestamppb.Now(), Event: event, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
			TrustDomain: v.trustDomain.Name(), CaInstance: v.Instance, CaVersion: cli.Version(), Configuration: c, Detail: detail,
		}, nil))
		return err
	}
	if err := record(ctx, ledgerv1.Event_EVENT_STARTED, "the ledger's tree is signed with "+vkey, &ledgerv1.Configuration{Digest: digest[:], Settings: settings}); err != nil {
		return nil, fmt.Errorf("record the start: %w", err)
	}
	return func(ctx context.Context) error {
		if err := record(ctx, ledgerv1.Event_EVENT_STOPPED, "", nil); err != nil {
			return fmt.Errorf("record the end: %w", err)
		}
		return nil
	}, nil
}

// Secrets are files and never settings; what somebody might write all the same,
// in an address or under a name of that kind, is not recorded.
var (
	secretInAddress = regexp.MustCompile(`(://[^/\s:@]*:)[^/\s@]*@`)
	secretAssigned  = regexp.MustCompile(`(?i)\b(password|passphrase|secret|token|authorization)=[^\s&"']+`)
	secretSetting   = regexp.MustCompile(`(?im)^(\s*[a-z_]*(?:password|passphrase|secret|token|authorization):[ \t]*)[^\s./|>{\[][^\n]*$`)
)

// effectiveSettings returns the settings in effect as YAML, without secrets.
func effectiveSettings(v *validated) (string, error) {
	text, err := yaml.Marshal(v.settings)
	if err != nil {
		return "", fmt.Errorf("write down the settings: %w", err)
	}
	return withoutSecrets(string(text)), nil
}

func withoutSecrets(text string) string {
	text = secretInAddress.ReplaceAllString(text, "$1***@")
	text = secretAssigned.ReplaceAllString(text, "$1=***")
	return secretSetting.ReplaceAllString(text, "$1***")
}
