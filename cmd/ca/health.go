package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
)

// Conditions that are reported here: pkg/ca and pkg/ledger do not know of health.
const (
	conditionAuthority = "authority"
	conditionLedger    = "ledger"
	conditionTree      = "ledger_tree"
	conditionWitness   = "ledger_witness"
	conditionRootKey   = "root_key"
)

// healthInterval is how often the authority and the journal are looked at.
const healthInterval = 5 * time.Second

// reportLedger keeps the condition of the ledger; it is ledger.Options.OnState.
func reportLedger(t *health.Tracker) func(error) {
	return func(err error) {
		if err != nil {
			t.Set(conditionLedger, health.Error, "nothing is issued: "+err.Error())
			return
		}
		t.Clear(conditionLedger)
	}
}

// report keeps one condition.
func report(t *health.Tracker, name string, warning, failure error) {
	switch {
	case failure != nil:
		t.Set(name, health.Error, failure.Error())
	case warning != nil:
		t.Set(name, health.Warning, warning.Error())
	default:
		t.Clear(name)
	}
}

// watchHealth keeps the conditions of the authority and of the ledger's tree until
// ctx ends. A journal that can never be written again ends the program: it cannot
// know what is on the disk, and only opening the journal anew can tell.
func watchHealth(ctx context.Context, authority *ca.CA, journal *ledger.Journal, proofs *tree.Tree, t *health.Tracker) error {
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	for {
		now := time.Now()
		warning, failure := authority.Health(now)
		report(t, conditionAuthority, warning, failure)
		warning, failure = proofs.Health(now)
		report(t, conditionTree, warning, failure)
		report(t, conditionWitness, proofs.WitnessHealth(now), nil)
		select {
		case <-ctx.Done():
			return nil
		case <-journal.Broken():
			return fmt.Errorf("the ledger cannot be written any more: %w\n  Check the disk under data_dir, then start again", journal.Failed())
		case <-ticker.C:
		}
	}
}

// trustStore has the roots; *store.DB has it.
type trustStore interface {
	Trust(ctx context.Context) (ca.Trust, error)
}

// watchKeys keeps the condition of the roots' keys until ctx ends: a CA that runs
// goes on without their files, and cannot be started again.
func watchKeys(ctx context.Context, interval time.Duration, authority *ca.CA, trust trustStore, from keys.Store, t *health.Tracker) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		err := authority.CheckRootKey()
		if err != nil {
			err = fmt.Errorf("the root's key cannot sign; X.509-SVIDs are issued for as long as the intermediate lives: %w", err)
		} else {
			err = checkKeys(ctx, trust, from)
		}
		report(t, conditionRootKey, err, nil)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// checkKeys opens the key of each root that is or may be signed with.
func checkKeys(ctx context.Context, trust trustStore, from keys.Store) error {
	now, err := trust.Trust(ctx)
	if err != nil {
		return fmt.Errorf("look for the roots' keys: %w", err)
	}
	for _, r := range now.Roots {
		if r.Key == "" || r.State != ca.StateActive && r.State != ca.StatePrepared {
			continue
		}
		if _, err := from.Open(ctx, r.Key); err != nil {
			return fmt.Errorf("the CA runs, and cannot be started again: put the root's key back: %w", err)
		}
	}
	return nil
}
