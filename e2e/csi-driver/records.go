package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// records are what the driver knows of volumes and snapshots: a JSON file each in the pool,
// so that all instances see the same and a restart loses nothing.
type records struct{ dir string }

type record interface{ kind() string }

type volume struct {
	ID, Name       string
	Size           int64 // bytes
	Block          bool
	FsType         string
	ReadOnly       bool
	Claim          string // namespace/name, when the sidecar says it
	Node           string // with topology: the only node that may use it
	SourceVolume   string
	SourceSnapshot string
	Created        time.Time
	Attached       string          // node; empty: none
	Published      map[string]bool // target path -> single writer
}

type snapshot struct {
	ID, Name      string
	Volume        string
	Claim         string // of the volume
	Group         string
	Size          int64 // bytes
	Created       time.Time
	ReadyAt       time.Time
	HideOneChange bool // fault: changed blocks leave out a range
}

type group struct {
	ID, Name  string
	Snapshots []string
	Volumes   []string // sorted
	Created   time.Time
}

type node struct{ ID string }

// attempts counts the injected failures of one snapshot name.
type attempts struct{ Failed int }

func (volume) kind() string   { return "volume" }
func (snapshot) kind() string { return "snapshot" }
func (group) kind() string    { return "group" }
func (node) kind() string     { return "node" }
func (attempts) kind() string { return "attempts" }

var unsafeInID = regexp.MustCompile(`[^A-Za-z0-9._-]`)

// recordID makes a file name of a CSI name; different names get different ids.
func recordID(name string) string {
	s := unsafeInID.ReplaceAllString(name, "_")
	if s == name && len(s) <= 100 {
		return s
	}
	h := fnv.New64a()
	h.Write([]byte(name)) // a hash never fails to write
	return fmt.Sprintf("%.80s-%x", s, h.Sum64())
}

func (r records) path(kind, id string) string { return filepath.Join(r.dir, kind+"-"+id+".json") }

// load gives os.ErrNotExist also for an id that this driver never makes, so that an id
// from outside cannot name a file elsewhere.
func load[T record](r records, id string) (*T, error) {
	m := new(T)
	if id == "" || unsafeInID.MatchString(id) {
		return nil, os.ErrNotExist
	}
	b, err := os.ReadFile(r.path((*m).kind(), id))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, err
	}
	return m, nil
}

func save[T record](r records, id string, m T) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("write record %s: %w", id, err)
	}
	p := r.path(m.kind(), id)
	if err := os.WriteFile(p+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(p+".tmp", p); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func remove[T record](r records, id string) error {
	var m T
	return removeFile(r.path(m.kind(), id))
}

// list is sorted by id, so that pages of a listing fit together.
func list[T record](r records) ([]*T, error) {
	var m T
	files, err := filepath.Glob(r.path(m.kind(), "*"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	var all []*T
	for _, f := range files {
		id := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), m.kind()+"-"), ".json")
		x, err := load[T](r, id)
		if errors.Is(err, os.ErrNotExist) { // deleted since the listing
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read record %s: %w", id, err)
		}
		all = append(all, x)
	}
	return all, nil
}

// removeFile is content when the file is gone already.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
